"""Muon: each matrix moves by its momentum with all singular values made about equal; AdamW for what is no matrix.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv:2502.16982 (Moonlight). Of a
matrix W of n rows and m columns, with the gradient G at rate lr:

    M <- mu M + (1 - mu) G                          momentum, here as a mean
    U  = mu M + (1 - mu) G                          Nesterov's look ahead
    O  = orthogonal(U)                              about the U V^T of its singular value decomposition
    W <- W - lr (0.2 sqrt(max(n, m)) O + decay W)   Moonlight's eq. 4, by which O is as large as AdamW's update

so the learning rate and weight decay of AdamW can be kept. The transformer's matrices in its blocks take it, and the
patch embedding's kernel, one row an output channel; norms, biases, tables, the embeddings of time and text, the head
and the text encoder take AdamW, as is usual.

The result needs the whole matrix. Ranks that share weights hold rows of each, so matrices of one size are dealt out to
them as owners: what is held of U goes to the owner in an all-to-all, and O comes back in another. Momentum is
elementwise and lies as its weight does. Replicas each do the same.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sora_train.config import OptimConfig
from sora_train.errors import ConfigError
from sora_train.parallel.context.collectives import exchange
from sora_train.parallel.memory.moments import adam_moments, moments_of
from sora_train.training.optim.judged import Judged

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Of AdamW's update, about; Moonlight's eq. 4."""
TINY = 1e-30
ROUND_BYTES = 2**28
"""Matrices that an owner works on at once are as many as fit, at least one."""


def orthogonal(matrices: Tensor) -> Tensor:
    """(..., n, m) in float32 or float64 -> the same singular vectors with singular values of 0.7 to 1.2.

    Newton-Schulz iterations of X <- a X + (b A + c A^2) X with A = X X^T, Jordan's coefficients. Zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # The largest singular value must not be above 1, and the Frobenius norm is no smaller than it.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def rows_of(rows: int, ranks: int) -> list[slice]:
    """The rows of each rank, as torch.chunk deals them out, which FSDP2 shards by; the last ones may have none."""
    size = -(-rows // ranks)
    return [slice(min(r * size, rows), min((r + 1) * size, rows)) for r in range(ranks)]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight that is a matrix, or a kernel as one of a row for each output channel."""

    weight: nn.Parameter
    """This rank's rows."""
    group: dict[str, Any]
    """Of the optimizer: its learning rate and weight decay."""
    shape: tuple[int, int]
    """Of the whole."""

    def rows(self, values: Tensor) -> Tensor:
        """This rank's part of a tensor like the weight, as rows of the matrix."""
        return values.view(len(self.weight), self.shape[1])


class Muon(Judged):
    """Muon for the parameters of `groups`, and `rest` for others; together they are one optimizer to whoever steps."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        rest: torch.optim.AdamW | None,
        placed: Mapping[nn.Parameter, Tensor],
        cfg: OptimConfig,
    ):
        """`placed` says of each parameter of `groups` how it lies over the ranks."""
        super().__init__(groups, {"lr": cfg.lr})
        self.momentum, self.rest = cfg.momentum, rest
        matrices = [
            Matrix(weight, group, (placed[weight].shape[0], placed[weight].shape[1:].numel()))
            for group in self.param_groups
            for weight in group["params"]
        ]
        # Stable: every rank has them in the same order. The largest come first, so that owners end up with alike sums.
        self.matrices = sorted(matrices, key=lambda m: (-math.prod(m.shape), m.shape))
        lies = next(iter(placed.values()))
        self.mesh_group = shards_of(lies) if isinstance(lies, DTensor) else None
        if rest is not None:
            rest.state = self.state
            self.param_groups += rest.param_groups

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if any(parameter is matrix.weight for matrix in self.matrices):
            return {"momentum": torch.zeros_like(parameter)}
        return adam_moments(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.rest is not None:
            self.rest.grad_scale, self.rest.found_inf = self.grad_scale, self.found_inf
            self.rest.step()
        for first, matrices in self._rounds():
            updates = [self._look_ahead(matrix) for matrix in matrices]
            if self.mesh_group is None:
                changes = list(orthogonal(torch.stack(updates)))
            else:
                changes = by_owners(updates, matrices[0].shape, first, self.mesh_group)
            for matrix, change in zip(matrices, changes, strict=True):
                self._move(matrix, change)

    def _rounds(self) -> Iterator[tuple[int, list[Matrix]]]:
        """Matrices of one shape that are worked on at once, and the number of the first among all."""
        ranks = dist.get_world_size(self.mesh_group) if self.mesh_group is not None else 1
        live = [matrix for matrix in self.matrices if matrix.weight.grad is not None]
        place = 0
        for shape, run in groupby(live, key=lambda matrix: matrix.shape):
            alike = list(run)
            size = math.prod(shape) * alike[0].weight.element_size()
            at_once = max(1, ROUND_BYTES // size) * ranks
            for start in range(0, len(alike), at_once):
                yield place + start, alike[start : start + at_once]
            place += len(alike)

    def _look_ahead(self, matrix: Matrix) -> Tensor:
        """This rank's rows of U; M is updated."""
        grad, momentum = self.gradient(matrix.weight), moments_of(self, matrix.weight)["momentum"]
        new = (1.0 - self.momentum) * self.taken()
        momentum.mul_(1.0 - new).add_(grad * new)
        return matrix.rows(torch.lerp(grad, momentum, self.momentum))

    def _move(self, matrix: Matrix, change: Tensor) -> None:
        rate = matrix.group["lr"] * self.taken()
        weight = matrix.rows(matrix.weight.detach())
        weight.mul_(1.0 - rate * matrix.group["weight_decay"])
        weight.sub_(change * (rate * RMS * math.sqrt(max(matrix.shape))))


def shards_of(parameter: DTensor) -> Any:
    """The process group that a weight's rows are shared among; None where each rank holds all."""
    mesh = parameter.device_mesh
    return mesh.get_group("fsdp") if mesh["fsdp"].size() > 1 else None


def by_owners(
    parts: Sequence[Tensor], shape: tuple[int, int], first: int, group: Any
) -> list[Tensor]:
    """`orthogonal` of matrices of one shape of which this rank holds rows; a collective. Returns the same rows of it.

    Matrix i belongs to the rank `(first + i) % ranks`.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, width = rows_of(shape[0], ranks), shape[1]
    owners = [(first + i) % ranks for i in range(len(parts))]
    # To each owner its matrices' rows that are here; from each rank its rows of the matrices owned here.
    sent = [
        torch.cat(
            [
                parts[0].new_empty(0),
                *(p.reshape(-1) for p, o in zip(parts, owners, strict=True) if o == r),
            ]
        )
        for r in range(ranks)
    ]
    mine = owners.count(rank)
    held = exchange(sent, [(mine, r.stop - r.start, width) for r in rows], group)
    whole = orthogonal(torch.cat(held, dim=1)) if mine else torch.cat(held, dim=1)
    # And back.
    here = rows[rank].stop - rows[rank].start
    back = exchange(
        [whole[:, r] for r in rows], [(owners.count(r), here, width) for r in range(ranks)], group
    )
    of_owner = [iter(found) for found in back]
    return [next(of_owner[owner]) for owner in owners]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix in a block of the transformer, or the patch embedding's kernel."""
    in_block = "blocks" in name.split(".") and parameter.ndim == 2
    return in_block or name.endswith("patch_embedding.weight")


def require_matrices(names: Iterable[str]) -> None:
    """Raises ConfigError where a model has none."""
    if not list(names):
        raise ConfigError(
            "optim.name=muon takes matrices in the `blocks` of a transformer, and this model trains none; set "
            "optim.name=adamw"
        )
