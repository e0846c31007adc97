"""The weights of a hollow model in the files of its checkpoint, by block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from talik.base.errors import SourceError
from talik.base.files import fingerprint
from talik.model.adapters import base_tensors
from talik.model.anatomy import parts_of
from talik.model.block import EMBEDDINGS, REST, Block
from talik.model.weights.conversion import Piece, pieces_of
from talik.model.weights.digests import file_state, tensor_digests
from talik.model.weights.safetensors_file import Entry, read_tables, tensor_bytes, weight_files
from talik.model.weights.working_copy import Overlay

ALIGNED = 64  # alignment of tensors in a buffer, in bytes
STAGING = 4 << 20  # bytes read at once if they are cast
GRAIN = 32768  # elements up to which PyTorch uses one thread; more would compete with computing threads


class Weights:
    """Reads blocks of a checkpoint into a hollow model: "embeddings", "layer 17", "tail" and "rest".

    "embeddings" is the table of the input tokens, "tail" the final norm and the head, "rest" everything else
    outside the layers (learned positions, norms of the embeddings; usually empty).

    Args:
        model: The hollow model.
        folder: The folder of the checkpoint.
        tables: Tensor tables in place of those of the folder's files, if nothing will be read.

    Raises:
        SourceError: The checkpoint lacks tensors, or shapes are not those of the model.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, tables: dict[Path, dict[str, Entry]] | None = None
    ) -> None:
        self.model, self.folder = model, folder
        self.forget = False  # drop pages of the files from the page cache after reading
        self.changed: Overlay | None = None  # replaces tensors of the checkpoint
        self._states = {} if tables else {file: file_state(file) for file in weight_files(folder)}
        tables = tables or read_tables(folder)
        self._table = {name: entry for table in tables.values() for name, entry in table.items()}
        self._parts = parts_of(model)
        made = {name: piece for piece in pieces_of(model, self._table) for name in piece.targets}
        self._untie_what_differs(made)
        self.look_again()
        self._made_of = {name: made[name] for name in self._hollow if name in made} | self._tied(made)
        if missing := sorted(self._hollow.keys() - self._made_of.keys()):
            shown = ", ".join(missing[:5])
            raise SourceError(f"the weights lack {len(missing)} tensors: {shown}", where=folder)
        self._names: dict[Block, list[str]] = {}
        for name in self._hollow:
            self._names.setdefault(self._block(name), []).append(name)
        self._staging: Tensor | None = None

    def look_again(self) -> None:
        """Indexes the model's tensors again. Call it after untying the head or adding adapters, before
        any read.
        """
        self._hollow: dict[str, Tensor] = base_tensors(self.model)
        self._first = {id(tensor): name for name, tensor in reversed(self._hollow.items())}

    def names(self, block: Block) -> list[str]:
        """The tensors of a block: parameters and persistent buffers, including tied ones."""
        return self._names.get(block, [])

    def trunk_names(self, cut: int) -> list[str]:
        """The tensors that the input of layer `cut` may depend on."""
        above = {"norm", "head", *(f"layer {i}" for i in range(cut, self._parts.count))}
        return [name for name in self._hollow if self._parts.part(name) not in above]

    def made_with(self, names: Iterable[str]) -> list[str]:
        """These tensors, and those that are made of the same tensors of the checkpoint."""
        pieces = {id(self._made_of[name]) for name in names}
        return [name for name, piece in self._made_of.items() if id(piece) in pieces]

    @property
    def parameters(self) -> int:
        """The number of parameters of the model, loaded or not; tied ones count once."""
        held = {id(t): t for t in self._hollow.values() if isinstance(t, nn.Parameter)}
        return sum(tensor.numel() for tensor in held.values())

    def hollow(self, name: str) -> Tensor:
        """The tensor without storage of this name before loading; tied names share one."""
        return self._hollow[name]

    def size(self, names: Iterable[str]) -> int:
        """Bytes of tensors one after the other, each aligned, in the model's dtypes."""
        return sum(_aligned(self._hollow[name].nbytes) for name in names)

    def bytes_in_files(self, names: Iterable[str]) -> int:
        """Bytes that must be read from the files for these tensors."""
        sources = {source for name in names for source, _ in self._made_of[name].sources}
        return sum(self._table[source].size for source in sources)

    def drop_staging(self) -> None:
        """Frees the buffer for tensors of another dtype; the next read allocates it again."""
        self._staging = None

    def fingerprint(self, names: Iterable[str]) -> str:
        """A hash of the content of these tensors."""
        digests = tensor_digests(self.folder)
        self._check_unchanged()
        return fingerprint(
            *(f"{name} {[digests[source] for source, _ in self._made_of[name].sources]}" for name in names)
        )

    def read(self, names: Iterable[str], buffer: Tensor) -> dict[str, Tensor]:
        """Reads tensors of the model into a buffer (uint8, on the CPU) and returns views of it.

        Raises:
            SourceError: A file is too short, cannot be read, or has changed; the error names the tensor.
        """
        self._check_unchanged()
        views: dict[str, Tensor] = {}
        unchanged: dict[str, Tensor] = {}
        start = 0
        for name in names:
            like = self._hollow[name]
            views[name] = buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
            start += _aligned(like.nbytes)
            if self.changed and self.one_name(name) in self.changed:
                self.changed.read(self.one_name(name), views[name])
            else:
                unchanged[name] = views[name]
        for piece in {id(self._made_of[name]): self._made_of[name] for name in unchanged}.values():
            self._read_piece(piece, {n: view for n, view in unchanged.items() if self._made_of[n] is piece})
        return views

    def to_write(self, block: Block) -> dict[str, Tensor]:
        """The trained tensors of a loaded block by their names in the working copy; tied tensors have
        one.
        """
        names = {self.one_name(name): name for name in self.names(block)}
        covered = {one: name for one, name in names.items() if self.changed and self.changed.covers(one)}
        owners = {one: self._owner(name) for one, name in covered.items()}
        return {one: getattr(module, own).detach() for one, (module, own) in owners.items()}

    def one_name(self, name: str) -> str:
        """The first of the names of tied tensors."""
        return self._first[id(self._hollow[name])]

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Sets tensors of the model; whether a parameter is trained does not change."""
        for name, tensor in tensors.items():
            module, own = self._owner(name)
            before = module._parameters.get(own)
            if before is None:
                module._buffers[own] = tensor
            elif isinstance(tensor, nn.Parameter):
                module._parameters[own] = tensor
            else:
                module._parameters[own] = nn.Parameter(tensor, requires_grad=before.requires_grad)

    def remove(self, block: Block) -> None:
        """Moves the block back to the meta device."""
        for name in self.names(block):
            module, own = self._owner(name)
            held = module._parameters if own in module._parameters else module._buffers
            held[own] = self._hollow[name]  # pyright: ignore[reportArgumentType]

    def _read_piece(self, piece: Piece, views: dict[str, Tensor]) -> None:
        """Reads directly into place if only the name differs; otherwise casts and converts."""
        source, like = piece.sources[0][0], next(iter(views.values()))
        if piece.converter is None and self._table[source].dtype == like.dtype:
            for view in views.values():
                self._read_bytes(source, view)
            return
        if piece.converter is None:
            for view in views.values():
                self._read_cast_into(source, view.view(-1))
            return
        made = piece.convert(
            {name: self._read_cast(name, like.dtype) for name, _ in piece.sources}, self.model
        )
        for name, view in views.items():
            view.copy_(made[name if name in made else self._twin(name, made)])

    def _read_cast(self, source: str, dtype: torch.dtype) -> Tensor:
        """Reads a tensor of the checkpoint and casts it before conversion, as `from_pretrained` does."""
        entry = self._table[source]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._read_bytes(source, tensor)
        return tensor.to(dtype)

    def _read_cast_into(self, source: str, flat: Tensor) -> None:
        """Reads a tensor of another dtype in pieces through a small buffer."""
        entry = self._table[source]
        step = STAGING // entry.dtype.itemsize
        if self._staging is None:
            self._staging = torch.empty(STAGING, dtype=torch.uint8)
        for start in range(0, flat.numel(), step):
            count = min(step, flat.numel() - start)
            part = self._staging[: count * entry.dtype.itemsize].view(entry.dtype)
            self._read_bytes(source, part, first=start)
            for own, read in zip(flat[start : start + count].split(GRAIN), part.split(GRAIN), strict=True):
                own.copy_(read)

    def _read_bytes(self, source: str, into: Tensor, first: int | None = None) -> None:
        """Fills `into` with the whole tensor, or with its elements from `first` on."""
        entry = self._table[source]
        try:
            part = entry if first is None else entry.part(first, into.numel())
            part.read_into(tensor_bytes(into), forget=self.forget)
        except (OSError, SourceError) as error:
            raise SourceError(f"{source} cannot be read: {error}", where=entry.file) from error

    def _check_unchanged(self) -> None:
        for file, state in self._states.items():
            if not file.is_file() or file_state(file) != state:
                held = next(name for name, entry in self._table.items() if entry.file == file)
                raise SourceError(
                    f"has changed since this run began to read it (it holds {held} and others)",
                    where=file,
                    remedy="Put the former file back, or start again with the new one.",
                )

    def _block(self, name: str) -> Block:
        """The block that a tensor belongs to."""
        if name.startswith(f"{self._parts.embedding}."):
            return EMBEDDINGS
        part = self._parts.part(name)
        return REST if part == "embeddings" else Block.of_part(part)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        return getattr(module, "base_layer", module), own  # an adapted layer holds the original one there

    def _tied(self, made: dict[str, Piece]) -> dict[str, Piece]:
        """The pieces for tensors that are in the checkpoint only under a tied name.

        Tied in the model, or tied by its class and untied since (`freeze.untie`).
        """
        of_tensor = {id(tensor): made[name] for name, tensor in self._hollow.items() if name in made}
        twins: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        found = {
            name: of_tensor.get(id(tensor)) or made.get(twins.get(name, ""))
            for name, tensor in self._hollow.items()
            if name not in made
        }
        return {name: piece for name, piece in found.items() if piece is not None}

    def _twin(self, name: str, made: dict[str, Tensor]) -> str:
        """The name of a converted tensor that this one is tied to."""
        return next(other for other in made if self._hollow.get(other) is self._hollow[name])

    def _untie_what_differs(self, made: dict[str, Piece]) -> None:
        """Unties tensors that the config ties but the checkpoint stores with different values, as
        `from_pretrained` does.
        """
        for name, twin in list(getattr(self.model, "all_tied_weights_keys", {}).items()):
            if name not in made or twin not in made:
                continue
            digests = tensor_digests(self.folder)
            one, other = ([digests[source] for source, _ in made[n].sources] for n in (name, twin))
            if one != other:
                module, own = self._owner(name)
                hollow = module._parameters[own]
                assert hollow is not None
                module._parameters[own] = nn.Parameter(torch.empty_like(hollow), hollow.requires_grad)
                self.model.all_tied_weights_keys.pop(name)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
