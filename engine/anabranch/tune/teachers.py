"""Tasks made by hand: linear teachers of low rank whose subspaces are partly shared, and tokens that name their task.

    y = sum over the R components of the token's task of  <v_i, x> u_i          v: inputs, u: outputs, orthonormal

Tasks stand in groups. Of its R components a task shares some with its whole group, the others are its own. A token is
content plus the code of its task, a direction that no teacher reads: it says which map to apply and changes no target.
One linear map cannot follow tasks whose contents have the same distribution. It can, with ranks enough, if each task's
contents lie in the directions which its own teacher reads: `own` goes from the first to the second.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """tasks N in groups of equal size; teachers of `rank` R, `shared` of it with the group; width D of x and of y.

    code  length of the direction that names a task; contents have length sqrt(D) on average
    own   share of the contents' energy that lies in the R directions which the task's teacher reads, beyond what they
          get of the rest, which has no direction
    """

    tasks: int = 8
    groups: int = 4
    rank: int = 4
    shared: int = 2
    width: int = 256
    code: float = 8.0
    own: float = 0.0

    def __post_init__(self) -> None:
        if self.groups < 1 or self.tasks < 1 or self.tasks % self.groups:
            raise ValueError(f"tasks must be a positive multiple of groups, got {self.tasks} and {self.groups}")
        if self.rank < 1 or not 0 <= self.shared <= self.rank:
            raise ValueError(f"need rank >= 1 and shared from 0 to rank, got {self.rank} and {self.shared}")
        if self.components + self.tasks > self.width:
            raise ValueError(
                f"{self.components} components and {self.tasks} codes need as many directions, got width {self.width}"
            )
        if self.code < 0 or not 0 <= self.own <= 1:
            raise ValueError(f"need code >= 0 and own from 0 to 1, got {self.code} and {self.own}")

    @property
    def components(self) -> int:
        """Directions that all teachers together read."""
        return self.groups * self.shared + self.tasks * (self.rank - self.shared)

    def group(self, task: int) -> int:
        return task // (self.tasks // self.groups)


class Teachers(NamedTuple):
    """inputs [N, R, D] and outputs [N, R, D] of unit length; codes [N, D], orthogonal to all inputs."""

    inputs: Tensor
    outputs: Tensor
    codes: Tensor


class Tokens(NamedTuple):
    """x [T, D], y [T, D], task [T] int64."""

    x: Tensor
    y: Tensor
    task: Tensor


def make_teachers(suite: Suite, generator: torch.Generator) -> Teachers:
    """Teachers in random directions."""

    def directions(count: int) -> Tensor:
        columns: Tensor = torch.linalg.qr(torch.randn(suite.width, count, generator=generator, dtype=torch.float64)).Q
        return columns.T.float()

    read, written = directions(suite.components + suite.tasks), directions(suite.components)
    own = suite.rank - suite.shared
    of_task = torch.tensor([
        [suite.group(task) * suite.shared + i for i in range(suite.shared)]
        + [suite.groups * suite.shared + task * own + i for i in range(own)]
        for task in range(suite.tasks)
    ])  # fmt: skip
    return Teachers(read[of_task], written[of_task], suite.code * read[suite.components :])


def draw(suite: Suite, teachers: Teachers, tokens: int, generator: torch.Generator) -> Tokens:
    """That many tokens of random tasks; targets have energy R on average, whatever `own` is."""
    task = torch.randint(suite.tasks, (tokens,), generator=generator)
    of_task = torch.nn.functional.one_hot(task, suite.tasks)[:, :, None]  # [T, N, 1]
    inputs, outputs = teachers.inputs.flatten(0, 1), teachers.outputs.flatten(0, 1)
    stretch = suite.own * suite.width / suite.rank
    content = (1 - suite.own) ** 0.5 * torch.randn(tokens, suite.width, generator=generator)
    inner = of_task * torch.randn(tokens, 1, suite.rank, generator=generator)
    content += stretch**0.5 * inner.flatten(1) @ inputs
    along = of_task * (content @ inputs.T).view(tokens, suite.tasks, suite.rank)
    y = along.flatten(1) @ outputs / (1 - suite.own + stretch) ** 0.5
    return Tokens(content + teachers.codes[task], y, task)
