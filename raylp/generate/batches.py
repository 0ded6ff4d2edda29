"""Which requests are generated together: by the requests and the bounds alone."""

from collections.abc import Sequence

from raylp.generate.base import Request


def batches(requests: Sequence[Request], rows: int, slots: int | None = None) -> list[list[int]]:
    """Indices of `requests` in batches of like length, shortest first.

    `rows`: the most requests in a batch; `slots`: the most rows x tokens, each row as long as the longest prompt and
    the longest bound in its batch (None: no bound). A request that is too long for `slots` is a batch of its own.
    """
    order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].max_new_tokens))
    found: list[list[int]] = []
    prompt = new = 0
    for i in order:
        prompt, new = len(requests[i].tokens), max(new, requests[i].max_new_tokens)
        full = not found or len(found[-1]) >= rows
        if full or (slots is not None and (len(found[-1]) + 1) * (prompt + new) > slots):
            found.append([])
            new = requests[i].max_new_tokens
        found[-1].append(i)
    return found
