"""Writes small random COMET checkpoints; runs in COMET's environment: tiny_comet.py DIRECTORY.

Each is a directory as COMET keeps it: hparams.yaml and checkpoints/model.ckpt. Their scores mean nothing, but they are
computed by COMET's own classes.
"""

import random
import sys
from pathlib import Path

import pytorch_lightning
import torch
import yaml
from comet.models import ReferencelessRegression, RegressionMetric
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
KINDS = {
    "tiny-comet": (RegressionMetric, "regression_metric"),
    "tiny-qe": (ReferencelessRegression, "referenceless_regression_metric"),
}


def write_encoder(folder: Path) -> None:
    """A two-layer XLM-R whose tokens are letters and pairs of letters."""
    generator = random.Random(0)
    text = ["".join(generator.choices("abcdefghij ", k=60)) for _ in range(50)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=[*SPECIAL.values()], unk_token="<unk>")
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **SPECIAL)
    fast.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        pad_token_id=1,
        initializer_range=0.3,  # far from the usual 0.02, so that sentences differ
    )
    XLMRobertaModel(config).save_pretrained(folder)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    write_encoder(folder / "encoder")
    for name, (kind, identifier) in KINDS.items():
        metric = kind(
            encoder_model="XLM-RoBERTa",
            pretrained_model=str(folder / "encoder"),
            layer="mix",
            hidden_sizes=[16],
            local_files_only=True,
        )
        hparams = dict(metric.hparams)
        (folder / name / "checkpoints").mkdir(parents=True)
        content = {"state_dict": metric.state_dict(), "hyper_parameters": hparams}
        content["pytorch-lightning_version"] = pytorch_lightning.__version__
        torch.save(content, folder / name / "checkpoints/model.ckpt")
        (folder / name / "hparams.yaml").write_text(yaml.safe_dump({**hparams, "class_identifier": identifier}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
