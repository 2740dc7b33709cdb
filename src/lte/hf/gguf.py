"""GGUF files: reading what they say of themselves, and holding what transformers makes of them against it.

transformers de-quantises the weights and builds config and tokenizer from the file's metadata; versions differ in what
of it they take over, and leave the rest out silently. What can be put right from the metadata is (special tokens, the
chat template, rotary scaling, the sliding window); anything else that does not fit is refused.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lte.files import GGUF_MAGIC

# The metadata's types of values that have a fixed size; 8 is a text, 9 an array.
_NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

# The first transformers that builds the tokenizer of every family in the table of docs/platforms.md as the files say.
SOUND_TRANSFORMERS = "5.18"
_REMEDY = (
    f"; take transformers {SOUND_TRANSFORMERS} or newer, a folder without another model's tokenizer files, or the "
    "model in the form of a folder"
)
# Byte-level vocabularies whose texts begin with a BOS token where the file does not say, as llama.cpp has it.
_PRE_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Whole words of the vocabulary that must come back as themselves. Those of a right tokenizer do but for a few.
_PIECES, _MIN_PIECES, _PIECE_SHARE = 1000, 8, 0.75
_SENTENCES = (
    "Once upon a time there was a little girl who lived in a small house near the forest.",
    "The sun rises in the east and sets in the west.",
    "Die Hauptstadt von Frankreich ist Paris, und die Hauptstadt von Italien ist Rom.",
    "El sol sale por el este y se pone por el oeste.",
    "Солнце встаёт на востоке и заходит на западе.",
    "太阳每天早上从东方升起。",
)
# A trained model's loss on the sentence that it knows best is 0.15 to 0.25 of log(vocabulary). One above this share
# does not fit its text if it is also surer of itself than it may be: over all sentences its loss is 1.0 to 1.2 times
# the entropy of its predictions, also where it has little or no training, for then it is as unsure as it is wrong.
_LOSS_SHARE, _OVERCONFIDENCE = 0.45, 1.35
# Smaller models may be toys that know a text of their own and nothing else.
_MIN_PARAMETERS = 5_000_000


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: of the file.
        metadata: by key.
        tensors: shape, in the order of PyTorch, and offset in bytes, by name.
        kinds: the number of each tensor's type, by name.
        places: the files of tensors that lie in another part of the model, by name.
        sentences: tokens of the plain sentences that its model is tried on, once its tokenizer was built.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[tuple[int, ...], int]]
    kinds: dict[str, int] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)
    sentences: list[list[int]] = field(default_factory=list)

    @property
    def version(self) -> tuple[int, int]:
        """When the file was changed, in nanoseconds, and its size in bytes: of the first, where there are several."""
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size

    def of_architecture(self, key: str) -> Any:
        """The metadata of the architecture, `llama.KEY` say."""
        return self.metadata.get(f"{self.metadata['general.architecture']}.{key}")

    def of_tokenizer(self, key: str) -> Any:
        """The metadata `tokenizer.ggml.KEY`."""
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def float_tensor(self, name: str) -> np.ndarray:
        """A one-dimensional tensor in float32, a file's factors of rotary frequencies say."""
        shape, offset = self.tensors[name]
        return np.fromfile(self.place(name), dtype="<f4", count=math.prod(shape), offset=offset)

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.places.get(name, self.path)


def read_gguf(path: str | Path, *, parts: bool = False) -> GgufFile:
    """Metadata and tensor table of a whole model in one GGUF file.

    Args:
        path: of the file.
        parts: whether it may be the first of several, whose tensors are then all in the table.

    Raises:
        ValueError: if there is no such file, the `gguf` package is missing, or it is no GGUF file, an incomplete one,
            one of several parts, an adapter, or one with tensors of a type that cannot be de-quantised.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"model must be an existing GGUF file, got {path}")
    status = path.stat()
    file = _read_gguf(path.absolute(), status.st_mtime_ns, status.st_size)
    count = file.metadata.get("split.count", 1)
    if count > 1 and not parts:
        raise ValueError(
            f"{path} must hold the whole model, got one of {count} parts; join them: llama-gguf-split --merge "
            "FIRST_PART WHOLE.gguf, or make a folder of them: lte convert FIRST_PART"
        )
    return _with_parts(file, count) if count > 1 else file


def _with_parts(first: GgufFile, count: int) -> GgufFile:
    """The first of several files, with the tables of the others, which lie beside it."""
    ending = f"-00001-of-{count:05d}.gguf"
    if first.metadata.get("split.no", 0) != 0 or not first.path.name.endswith(ending):
        raise ValueError(
            f"model must be the first of its {count} GGUF files, named ...{ending}, got {first.path.name}; name that"
        )
    tensors, kinds, places = dict(first.tensors), dict(first.kinds), dict[str, Path]()
    for number in range(2, count + 1):
        path = first.path.with_name(first.path.name.removesuffix(ending) + f"-{number:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise ValueError(f"{first.path} must lie beside its other parts, got no {path.name}; copy or download it")
        status = path.stat()
        part = _read_gguf(path, status.st_mtime_ns, status.st_size)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number - 1, count):
            raise ValueError(f"{path} must be part {number} of {count}, got another; copy or download it again")
        tensors |= part.tensors
        kinds |= part.kinds
        places |= dict.fromkeys(part.tensors, path)
    return GgufFile(first.path, first.metadata, tensors, kinds, places)


@lru_cache(maxsize=2)
def _read_gguf(path: Path, changed_ns: int, size: int) -> GgufFile:
    with path.open("rb") as stream:
        start = stream.read(8)
    if start[:4] != GGUF_MAGIC:
        raise ValueError(f"model must be a GGUF file, got {path}, which does not begin with the letters GGUF")
    version = int.from_bytes(start[4:], "little")
    if version not in (2, 3):
        raise ValueError(
            f"{path} must be a little-endian GGUF file of version 2 or 3, got version={version}; convert it again with "
            "a newer llama.cpp"
        )
    try:
        file, end = _parse(path, np.memmap(path, mode="r", dtype=np.uint8))
    except (struct.error, IndexError, MemoryError, OverflowError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} must be a whole GGUF file, got one that ends or breaks in its header") from error
    if end > size:
        raise ValueError(f"{path} must be a whole GGUF file, got {size} bytes of {end}; copy or download it again")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{path} must hold a model, got general.type={kind}")
    return file


def _parse(path: Path, data: np.ndarray) -> tuple[GgufFile, int]:
    """The file's table, and where the last tensor ends."""
    gguf = gguf_package(path)
    place = 8

    def take(form: str) -> Any:
        nonlocal place
        values = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return values if len(values) != 1 else values[0]

    def text() -> str:
        nonlocal place
        length = take("Q")
        if place + length > len(data):
            raise IndexError
        place += length
        return data[place - length : place].tobytes().decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind != 9:
            return take(_NUMBERS[kind])
        kind, count = take("IQ")
        if kind in _NUMBERS:
            values = take(f"{count}{_NUMBERS[kind]}")
            return list(values) if count > 1 else [values] * count
        return [value(kind) for _ in range(count)]

    tensor_count, field_count = take("QQ")
    metadata = {}
    for _ in range(field_count):
        key = text()
        metadata[key] = value(take("I"))
    if not metadata.get("split.no"):  # What is not said in the first part is said nowhere.
        metadata["general.architecture"]
    table = []
    for _ in range(tensor_count):
        name, dimensions = text(), take("I")
        shape = tuple(take("Q") for _ in range(dimensions))[::-1]
        table.append((name, shape, *take("IQ")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-place // alignment) * alignment
    tensors, kinds, end = {}, {}, place
    for name, shape, kind, offset in table:
        block, block_bytes = block_of(path, name, kind, gguf)
        tensors[name], kinds[name] = (shape, start + offset), kind
        end = max(end, start + offset + math.prod(shape) // block * block_bytes)
    return GgufFile(path, metadata, tensors, kinds), end


def gguf_package(path: Path) -> Any:
    """The package that reads them.

    Raises:
        ValueError: if it is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"reading {path} needs the gguf package: pip install gguf") from error
    return gguf


def block_of(path: Path, name: str, kind: int, gguf: Any) -> tuple[int, int]:
    """Numbers and bytes in a block of a type of tensors that can be de-quantised."""
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), quantization)
    except (ValueError, KeyError, NotImplementedError) as error:
        known = getattr(error, "name", None) or kind
        raise ValueError(
            f"{path} must have tensors that the gguf package can de-quantise, got {name} of type {known}; take a file "
            "with another quantisation, Q8_0 say, or a newer gguf package"
        ) from error
    return block, block_bytes


def gguf_config(path: str | Path) -> Any:
    """The config of a GGUF file, with what transformers leaves out: rotary scaling, sliding window, attention's scale.

    Raises:
        ValueError: for a file that cannot be read, an architecture that transformers does not know, or rotary scaling
            that cannot be expressed.
    """
    file = read_gguf(path, parts=True)
    return copy.deepcopy(_config_of(path, *file.version))


@lru_cache(maxsize=2)
def _config_of(path: str | Path, changed_ns: int, size: int) -> Any:
    """`gguf_config`, read once: transformers takes seconds to read the metadata of a large vocabulary."""
    file = read_gguf(path, parts=True)
    try:
        config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except (ValueError, KeyError, OSError) as error:
        kind = file.metadata["general.architecture"]
        raise ValueError(f"{path} must hold a model that transformers can read, got {kind}: {error}") from error
    rows = file.tensors.get("token_embd.weight", ((config.vocab_size,), 0))[0][0]
    tokens = file.of_tokenizer("tokens") or ()
    if len(tokens) > rows:
        raise ValueError(f"{path} must have an embedding for each of its {len(tokens)} tokens, got {rows}")
    if file.places:
        # transformers has looked into the first part alone.
        config.tie_word_embeddings = "output.weight" not in file.tensors
    window = file.of_architecture("attention.sliding_window")
    if window and config.model_type in ("mistral", "phi3"):
        config.sliding_window = window
    # llama.cpp has this number in its code: of these, the models of 27B parameters alone have another one.
    if config.model_type in ("gemma2", "gemma3_text") and config.num_hidden_layers in (46, 62):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if scaling := _rope_scaling(file):
        rope = config.rope_parameters
        # Gemma 3 scales its full attention alone.
        rope.get("full_attention", rope).update(scaling)
    return config


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """What the file says of rotary scaling, in the words of transformers."""
    kind = file.of_architecture("rope.scaling.type")
    factor = file.of_architecture("rope.scaling.factor") or file.of_architecture("rope.scale_linear")
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file)
    if any("rope_factors" in name for name in file.tensors) or kind not in (None, "none", "linear", "yarn"):
        raise ValueError(
            f"{file.path} must have rotary scaling of the kinds linear, yarn or llama3, got {kind or 'factors'}; take "
            "the model's folder"
        )
    if kind == "none" or not factor or factor == 1:
        return None
    if kind == "yarn":
        trained = file.of_architecture("rope.scaling.original_context_length")
        known = {"original_max_position_embeddings": trained} if trained else {}
        return {"rope_type": "yarn", "factor": factor, **known}
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GgufFile) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file has the divisors of the frequencies alone."""
    divisors = file.float_tensor("rope_freqs.weight").astype(np.float64)
    low, high, trained, factor = 1.0, 4.0, 8192, float(divisors.max())
    exponents = np.arange(len(divisors)) / len(divisors)
    turns = trained / (2 * math.pi) * (file.of_architecture("rope.freq_base") or 10000.0) ** -exponents
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ValueError(
            f"{file.path} must have rotary scaling of the kinds linear, yarn or llama3, got other factors in "
            "rope_freqs.weight; take the model's folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


def has_tokenizer(path: str | Path) -> bool:
    """Whether a GGUF file, or the first of those of a model in parts, brings a tokenizer."""
    return bool(read_gguf(path, parts=True).of_tokenizer("tokens"))


def gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with the special tokens and the chat template of its metadata.

    Raises:
        ValueError: if the file has none, or if the tokenizer that transformers builds is not the file's.
    """
    file = read_gguf(path, parts=True)
    tokenizer = copy.deepcopy(_tokenizer_of(path, *file.version))
    file.sentences[:] = [tokenizer(sentence)["input_ids"] for sentence in _SENTENCES]
    return tokenizer


@lru_cache(maxsize=2)
def _tokenizer_of(path: str | Path, changed_ns: int, size: int) -> PreTrainedTokenizerBase:
    """`gguf_tokenizer`, built once."""
    file = read_gguf(path, parts=True)
    if not has_tokenizer(path):
        raise ValueError(f"{path} must hold a tokenizer, got none in its metadata; take a file with tokenizer.ggml.*")
    count = len(file.of_tokenizer("tokens"))
    for key in _SPECIAL.values():
        index = file.of_tokenizer(key)
        if index is not None and not 0 <= index < count:
            raise ValueError(f"{path} must name one of its {count} tokens, got {key}={index}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except Exception as error:  # The tokenizers package raises nothing more special.
        raise ValueError(f"{path} must hold a tokenizer that transformers can build: {error}") from error
    tokenizer = _with_own_tokens(tokenizer, file)
    _check_tokenizer(tokenizer, file)
    return tokenizer


def _with_own_tokens(tokenizer: Any, file: GgufFile) -> Any:
    tokens: list[str] = file.of_tokenizer("tokens")
    if len(tokenizer) > len(tokens):
        tokenizer = _without_foreign_tokens(tokenizer, file)
    if len(tokenizer) > len(tokens):
        raise ValueError(
            f"{file.path} must give a tokenizer of {len(tokens)} tokens, got {len(tokenizer)} from transformers"
            f"{_REMEDY}"
        )
    kinds = file.of_tokenizer("token_type") or ()
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.added_tokens_decoder)
    strays = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and vocabulary.get(token) == index and index not in added
    ]
    if strays:
        tokenizer.add_tokens(strays)
    for name, key in _SPECIAL.items():
        index = file.of_tokenizer(key)
        if index is None:  # What transformers takes instead stays.
            continue
        if vocabulary.get(tokens[index]) != index:
            raise ValueError(
                f"{file.path} must give a tokenizer with its special tokens, got {vocabulary.get(tokens[index])} for "
                f"{tokens[index]!r} where {key}={index}{_REMEDY}"
            )
        if getattr(tokenizer, name) != tokens[index]:
            setattr(tokenizer, name, tokens[index])
    kind = file.of_tokenizer("model")
    begins, ends = file.of_tokenizer("add_bos_token"), file.of_tokenizer("add_eos_token")
    if begins is None and kind in ("llama", "gpt2"):
        begins = kind == "llama" or file.of_tokenizer("pre") in _PRE_WITH_BOS
    for name, wanted in (("add_bos_token", begins), ("add_eos_token", ends)):
        if wanted is not None and kind in ("llama", "gpt2"):
            setattr(tokenizer, name, wanted)
    if kind == "llama" and file.of_tokenizer("add_space_prefix") is False:
        _without_space_prefix_(tokenizer)
    if template := file.metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    return tokenizer


def _without_foreign_tokens(tokenizer: Any, file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer without tokens that have no embedding.

    They come from a class that is another model's of the same architecture, or are special tokens whose letters are no
    bytes, DeepSeek's say, which transformers respelled in the vocabulary and then added once more.
    """
    tokens: list[str] = file.of_tokenizer("tokens")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < len(tokens)]
    if file.of_tokenizer("model") == "gpt2":
        kinds, own = file.of_tokenizer("token_type") or (), parts["model"]["vocab"]
        control = {index for index, kind in enumerate(kinds) if kind == _CONTROL}
        parts["model"]["vocab"] = {tokens[i] if i in control else token: i for token, i in own.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), clean_up_tokenization_spaces=False
    )


def _without_space_prefix_(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    if isinstance(before, pre_tokenizers.Metaspace) and before.prepend_scheme != "never":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(before.replacement, "never", before.split)
        # A decoder would take the space of a first word for the prefix.
        backend.decoder = decoders.Sequence(
            [decoders.Replace(before.replacement, " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _check_tokenizer(tokenizer: Any, file: GgufFile) -> None:
    """Refuses a tokenizer that does not cut text into the file's tokens."""
    words = _words(file)
    if len(words) >= _MIN_PIECES:
        wrong = [text for index, text in words if index not in _ids(tokenizer, text)]
        if len(wrong) > (1 - _PIECE_SHARE) * len(words):
            cut = tokenizer.convert_ids_to_tokens(_ids(tokenizer, wrong[0]))
            raise ValueError(
                f"{file.path} must give a tokenizer that finds the words of its vocabulary, got one that misses "
                f"{len(wrong)} of {len(words)}: {wrong[0]!r} becomes {cut}{_REMEDY}"
            )
    for sentence in filter(_spells(file), _SENTENCES):
        back = tokenizer.decode(_ids(tokenizer, sentence), clean_up_tokenization_spaces=False)
        if back.strip() != sentence.strip():
            raise ValueError(
                f"{file.path} must give a tokenizer that gives text back, got {back!r} for {sentence!r}{_REMEDY}"
            )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _words(file: GgufFile) -> list[tuple[int, str]]:
    """Ids and texts, from all over the vocabulary, of tokens that are a space and letters."""
    kinds = file.of_tokenizer("token_type")
    found = []
    for index, token in enumerate(file.of_tokenizer("tokens")):
        word = token[1:]
        whole = token[:1] in ("Ġ", "▁") and len(word) > 2 and word.isascii() and word.isalpha()
        if whole and (kinds is None or kinds[index] == _NORMAL):
            found.append((index, f" {word}"))
    return found[:: max(1, len(found) // _PIECES)]


def _spells(file: GgufFile) -> Callable[[str], bool]:
    """Whether the vocabulary has all letters of a text."""
    tokens, kinds = file.of_tokenizer("tokens"), file.of_tokenizer("token_type") or ()
    if _BYTE in kinds:
        return lambda text: True
    letters = {token for token in tokens if len(token) == 1}
    if file.of_tokenizer("model") == "gpt2":
        return lambda text: len(letters) >= 256 or (text.isascii() and set(text.replace(" ", "Ġ")) <= letters)
    return lambda text: set(text.replace(" ", "▁")) <= letters


def check_gguf_model(model: Any, path: str | Path) -> None:
    """Refuses a causal language model that does not hold all of its GGUF file, or cannot read plain text.

    Args:
        model: what transformers made of the file.
        path: of the file.

    Raises:
        ValueError: if tensors of the file are left out, or if the model predicts plain sentences of five languages far
            worse than any trained model, and is sure of it. Models below five million parameters get a warning.
    """
    file = read_gguf(path)
    held = sum(math.prod(shape) for name, (shape, _) in file.tensors.items() if not name.startswith("rope_f"))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held != taken:
        raise ValueError(
            f"{path} must hold the numbers that a {type(model).__name__} has, got {held:,} in the file and {taken:,} "
            "in the model; transformers does not read this file whole"
        )
    if not file.of_tokenizer("tokens"):
        return
    if not file.sentences:
        gguf_tokenizer(path)
    scores = [_score(model, ids) for ids in file.sentences if len(ids) > 4]
    if not scores:
        return
    losses, entropies = (np.array(values) for values in zip(*scores, strict=True))
    chance = math.log(model.get_input_embeddings().weight.shape[0])
    # Written so that NaN fails.
    if losses.min() < _LOSS_SHARE * chance or losses.mean() < _OVERCONFIDENCE * entropies.mean():
        return
    message = (
        f"{path} must give a model that predicts plain text, got a loss of {losses.min():.1f} nats a token on the best "
        f"of {len(losses)} sentences, where guessing has {chance:.1f}; its weights and its tokenizer do not belong "
        f"together, or transformers {transformers.__version__} reads one of them wrongly: take another version, or the "
        "model's folder"
    )
    if taken >= _MIN_PARAMETERS:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


@torch.no_grad()
def _score(model: Any, ids: list[int]) -> tuple[float, float]:
    """Loss of a text, and how unsure the model is: the entropy of its predictions, both in nats a token."""
    tokens = torch.tensor([ids])
    logits: Tensor = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    loss = -logits.gather(1, tokens[0, 1:, None]).mean()
    entropy = -(logits.exp() * logits).sum(-1).mean()
    return float(loss), float(entropy)
