"""Provide the models that need no download: the demo model that comes with verbatim, and the noise checkpoint.

The noise checkpoint is a Qwen3-type model with a byte-level tokenizer and a ChatML template, the same bytes on every
machine. Its text is noise; everything else is real.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from engine.cache_folder import cache_folder, make_private
from engine.errors import LoadError

VERSION = "3"
"""Part of the folder's name: raised when the recipe changes."""

_SEAL = ".sha256"
"""The file in the folder that holds a digest of the others."""

_TEXT = """the bits of a reply depend on the model, the prompt, the parameters and the seed, and on nothing else.
every parameter is honoured exactly or refused by name. a seed chooses one reply among all that are possible; the same
seed with the same request gives the same words again, alone or in a crowd, today or next year. this model has never
read anything: its weights are random numbers, so it speaks in noise, but it speaks the same noise every time."""

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def demo_model() -> Path:
    """Return the folder of the demo model: inside the package in a wheel, in `demo/` in a checkout.

    Raises:
        LoadError: this copy of verbatim came without it.
    """
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "demo_model", here.parent / "demo" / "model"):
        if (folder / "config.json").exists():
            return folder
    raise LoadError(f"this copy of verbatim came without the demo model: {here / 'demo_model'} does not exist.")


def ensure_noise_checkpoint(folder: Path | None = None) -> Path:
    """Return the folder of the noise checkpoint, written if it is missing or damaged; never half-written.

    Raises:
        LoadError: there is no folder to keep it in.
    """
    parent = folder or cache_folder()
    if parent is None:
        raise LoadError("there is no home to keep the noise checkpoint in; set XDG_CACHE_HOME to a folder.")
    target = parent / f"noise-{VERSION}"
    if _is_whole(target):
        return target
    make_private(parent)  # the folder holds compiled kernels, too
    scratch = Path(tempfile.mkdtemp(prefix=".noise-", dir=parent))
    try:
        _write(scratch / "new")
        _seal(scratch / "new")
        if not _is_whole(target):  # another process may have been faster
            with contextlib.suppress(OSError):
                target.rename(scratch / "old")
        try:
            (scratch / "new").rename(target)
        except OSError:
            if not _is_whole(target):  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _seal(folder: Path) -> None:
    """Flush all files to the disk, then write their digest: after a power cut, damage is seen."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    with (folder / _SEAL).open("w") as file:
        file.write(_digest(folder))
        file.flush()
        os.fsync(file.fileno())


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder holds what was written, and this user or root owns it."""
    try:
        mine = not hasattr(os, "geteuid") or folder.lstat().st_uid in (os.geteuid(), 0)
        return mine and not folder.is_symlink() and (folder / _SEAL).read_text() == _digest(folder)
    except (OSError, ValueError):
        return False


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != _SEAL:
            total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _write(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.06, generator=generator)
        # Whole words are likelier than single bytes, which would mostly be no characters at all.
        single = len(special) + len(pre_tokenizers.ByteLevel.alphabet())
        model.lm_head.weight[:single] *= 0.3
        model.lm_head.weight[single:] *= 3.0
        model.lm_head.weight[tokenizer.eos_token_id] *= 10.0
    model.to(torch.bfloat16).save_pretrained(folder)
