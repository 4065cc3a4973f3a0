"""Process groups over a mesh. The launcher makes a :class:`ParallelContext`, once, and passes it on."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megapoly.mesh import Mesh


@dataclass
class Traffic:
    """What one axis has carried: calls, payload bytes handed in by this rank, and seconds it waited for them.

    On a GPU the seconds are those of the host, which goes on before the data has arrived: they say nothing there.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def since(self, before: Traffic) -> Traffic:
        """What came after the copy ``before`` was taken."""
        return Traffic(self.calls - before.calls, self.bytes - before.bytes, self.seconds - before.seconds)


@dataclass(frozen=True)
class Axis:
    """One rank's view of the ranks that it shares something with.

    Attributes:
        name: for messages and metrics.
        ranks: global ranks, ascending.
        rank: this rank's position in ``ranks``.
        group: None where the axis has one rank; no collective is then issued.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


ALONE = Axis("alone")  # over it, every collective is the identity


@dataclass(frozen=True)
class ParallelContext:
    """Every axis of one rank.

    ``model`` spans pp and tp: one replica of the model. ``tied`` joins the first and the last stage, which both hold
    the tied embedding; on other stages it has one rank. ``pp`` carries activations down the pipeline and ``backward``
    gradients up: two communicators, because NCCL makes one queue of each. ``control`` is a CPU group over all ranks for
    small objects and decisions.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    dp: Axis
    pp: Axis
    tp: Axis
    model: Axis
    tied: Axis
    backward: Axis
    control: Axis

    @classmethod
    def create(
        cls,
        mesh: Mesh | None = None,
        device: torch.device | str = "cpu",
        timeout: datetime.timedelta = datetime.timedelta(minutes=10),
    ) -> ParallelContext:
        """Make the groups. With more than one rank torch.distributed must be initialised, and every rank must call."""
        mesh = mesh or Mesh()
        rank = dist.get_rank() if mesh.world_size > 1 else 0
        if mesh.world_size > 1 and dist.get_world_size() != mesh.world_size:
            raise ValueError(f"{mesh} needs {mesh.world_size} ranks; {dist.get_world_size()} were started")

        def axis(name: str, groups: list[tuple[int, ...]], backend: str | None = None) -> Axis:
            mine = Axis(name, (rank,))
            for ranks in groups:
                if len(ranks) < 2:
                    continue
                group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
                if rank in ranks:
                    mine = Axis(name, ranks, ranks.index(rank), group)
            return mine

        pipelines = mesh.groups(("pp",))
        return cls(
            mesh=mesh,
            rank=rank,
            device=torch.device(device),
            dp=axis("dp", mesh.groups(("dp",))),
            pp=axis("pp", pipelines),
            tp=axis("tp", mesh.groups(("tp",))),
            model=axis("model", mesh.groups(("pp", "tp"))),
            tied=axis("tied", [(ranks[0], ranks[-1]) for ranks in pipelines] if mesh.pp > 1 else []),
            backward=axis("pp (gradients)", pipelines),
            control=axis("control", [tuple(range(mesh.world_size))], backend="gloo" if mesh.world_size > 1 else None),
        )

    def another_control(self, name: str, timeout: datetime.timedelta) -> Axis:
        """A further CPU group over all ranks, for a thread of its own. Collective."""
        if self.mesh.world_size == 1:
            return Axis(name, (self.rank,))
        ranks = tuple(range(self.mesh.world_size))
        return Axis(name, ranks, self.rank, dist.new_group(list(ranks), timeout=timeout, backend="gloo"))

    def close(self) -> None:
        """Give back the groups and their threads. Collective."""
        for group in {id(axis.group): axis.group for axis in self.axes() if axis.group is not None}.values():
            dist.destroy_process_group(group)

    def axes(self) -> list[Axis]:
        """All axes, for metrics."""
        return [v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Axis)]
