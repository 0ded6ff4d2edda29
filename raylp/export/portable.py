"""The recipe and the plan of a run for other machines: what lay on this one lies beside the recipe there."""

import itertools
from pathlib import Path, PurePath
from typing import Any

import yaml

from raylp.export.card import is_directory, shareable
from raylp.metrics.comet import is_path
from raylp.recipe import CORPUS_FILES

BASE, TEACHER = "base", "teacher"


class Portable:
    """Gives every file and directory that a recipe names a place beside the recipe, no two the same one.

    `needed`: by place, which model or COMET checkpoint belongs there.
    """

    def __init__(self) -> None:
        self.needed: dict[str, str] = {}
        self._taken: dict[str, str] = {}

    def recipe(self, text: str) -> str:
        """The recipe with models, metrics, data files and run directory beside it.

        What does not change the weights is left out: resources, endpoint, benchmark.
        """
        content = {k: v for k, v in yaml.safe_load(text).items() if k not in ("resources", "serve", "bench")}
        model, search, distill, evaluate = (content.get(k) or {} for k in ("model", "search", "distill", "evaluate"))
        if is_directory(model["name"]):
            self.needed[BASE] = f"the model {shareable(model['name'])} it was cut from"
            model["name"] = BASE
        for source, corpus in content.get("data", {}).items():
            for key in CORPUS_FILES:
                if files := corpus.get(key):
                    folder = f"data/{source.replace(':', '-')}/{key}"
                    places = [self._place(file, folder) for file in ([files] if isinstance(files, str) else files)]
                    corpus[key] = places[0] if isinstance(files, str) else places
        if "objective" in search:
            search["objective"] = self._metrics(search["objective"])
        if "metrics" in evaluate:
            evaluate["metrics"] = [self._metric(name) for name in evaluate["metrics"]]
        teacher = distill.get("teacher", "base")
        # A teacher behind an endpoint has the name that the endpoint knows.
        if teacher != "base" and not distill.get("endpoint") and is_directory(teacher):
            self.needed[TEACHER] = f"the teacher {shareable(teacher)}"
            distill["teacher"] = TEACHER
        filters = distill.get("filters") or {}
        for section, key in ((distill, "by"), (filters, "comet")):
            if key in section:
                section[key] = self._metric(section[key])
        embedding = filters.get("embedding_model")
        if embedding and (embedding.startswith(("/", "~", ".")) or Path(embedding).is_dir()):
            filters["embedding_model"] = self._needed(embedding, "./embedding", "the embedding model")
        content |= {"run_dir": "run", "cache": None}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        """plan.json with the metrics as `recipe` names them."""
        return {**plan, "objective": self._metrics(plan["objective"])} if plan.get("objective") else plan

    def _metrics(self, weights: dict[str, float]) -> dict[str, float]:
        return {self._metric(name): weight for name, weight in weights.items()}

    def _metric(self, name: str) -> str:
        """A COMET checkpoint that is named by its place moves with its whole directory; other metrics stay."""
        if not is_path(name):
            return name
        file = Path(name).expanduser().absolute()
        directory = file.parents[1] if file.suffix == ".ckpt" else file
        place = self._needed(str(directory), "./comet", "the COMET checkpoint")
        return "/".join((place, *file.relative_to(directory).parts))

    def _needed(self, path: str, folder: str, what: str) -> str:
        place = self._place(path, folder)
        self.needed[place.removeprefix("./")] = f"{what} {PurePath(path).name}"
        return place

    def _place(self, path: str, folder: str) -> str:
        """`folder` and the file's name, with a number where another file has that place."""
        file = PurePath(path)
        numbered = (f"{folder}/{file.stem}-{number}{file.suffix}" for number in itertools.count(2))
        places = itertools.chain([f"{folder}/{file.name}"], numbered)
        return next(place for place in places if self._taken.setdefault(place, path) == path)
