"""Ids of processes that only their programs believe in: the rules of setuid(2) and its kin as pure functions.

Where a user namespace has a single id, `supervisor` answers such calls with these, so that a program that
drops its privileges, and checks that it has, finds what it expects. Privileged is whose effective user is 0,
or who asked to keep the capabilities of one: no others are told apart. credentials(7).
"""

from __future__ import annotations

from layers.values import NamedTuple

UNCHANGED = 0xFFFFFFFF
"""-1 as an id: leave it."""


class Ids(NamedTuple):
    """User ids, or group ids, of a process: real, effective, saved, and that of file access."""

    real: int = 0
    effective: int = 0
    saved: int = 0
    files: int = 0

    @classmethod
    def all(cls, number: int) -> Ids:
        """The four of them alike."""
        return cls(number, number, number, number)

    def set(self, number: int, privileged: bool) -> Ids:
        """setuid(2), setgid(2). Raises: PermissionError."""
        if privileged:
            return Ids.all(number)
        if number not in (self.real, self.saved):
            raise PermissionError
        return self._replace(effective=number, files=number)

    def set_re(self, real: int, effective: int, privileged: bool) -> Ids:
        """setreuid(2), setregid(2). Raises: PermissionError."""
        if not privileged and (
            real not in (UNCHANGED, self.real, self.effective)
            or effective not in (UNCHANGED, self.real, self.effective, self.saved)
        ):
            raise PermissionError
        new = self._replace(
            real=self.real if real == UNCHANGED else real,
            effective=self.effective if effective == UNCHANGED else effective,
        )
        if real != UNCHANGED or effective not in (UNCHANGED, self.real):
            new = new._replace(saved=new.effective)
        return new._replace(files=new.effective)

    def set_res(self, real: int, effective: int, saved: int, privileged: bool) -> Ids:
        """setresuid(2), setresgid(2). Raises: PermissionError."""
        mine = (UNCHANGED, self.real, self.effective, self.saved)
        if not privileged and any(number not in mine for number in (real, effective, saved)):
            raise PermissionError
        wanted = zip((real, effective, saved), self, strict=False)
        new = [old if number == UNCHANGED else number for number, old in wanted]
        return Ids(new[0], new[1], new[2], new[1])

    def set_files(self, number: int, privileged: bool) -> Ids:
        """setfsuid(2), setfsgid(2), which never fail."""
        return self._replace(files=number) if number != UNCHANGED and (privileged or number in self) else self


class Credentials(NamedTuple):
    """Who a process believes to be."""

    users: Ids = Ids()
    groups: Ids = Ids()
    supplementary: tuple[int, ...] = ()
    keeping: bool = False
    """PR_SET_KEEPCAPS was set by who was privileged; until the next execve(2)."""

    @property
    def privileged(self) -> bool:
        """Whether it may take any id."""
        return self.users.effective == 0 or self.keeping

    def executing(self, owner: int | None, group: int | None) -> Credentials:
        """After execve(2) of a file that has a set-user-ID bit and that owner, a set-group-ID bit and that group."""
        users, groups = (
            ids.set_res(UNCHANGED, wanted, wanted, True)
            for ids, wanted in (
                (self.users, self.users.effective if owner is None else owner),
                (self.groups, self.groups.effective if group is None else group),
            )
        )
        return self._replace(users=users, groups=groups, keeping=False)

    def in_group(self, number: int) -> bool:
        """Whether files of that group are its group's."""
        return number == self.groups.files or number in self.supplementary
