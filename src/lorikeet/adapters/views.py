"""Adapters as ``GET /v1/adapters`` shows them: a copy of what the engine says, kept current by what has changed.

It lives in the HTTP process, so that no list, however long and whoever asks for it how often, takes anything from the
engine's loop, and a list is answered while the engine does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec

from lorikeet.adapters.registry import never_loaded
from lorikeet.core.messages import AdaptersChanged
from lorikeet.core.views import AdapterDetail, AdapterState, AdapterUse, AdapterView

# Of several versions of a name, the first of these is the one that a request would get.
_STATES: tuple[AdapterState, ...] = get_args(AdapterState)


class AdapterViews:
    """What every name means, and how its version is used.

    Attributes:
        num_changes: moves when a name comes, goes or means something else.
    """

    def __init__(self) -> None:
        # Names that requests may use, in the order of their loading. Others of the same names come or go.
        self._served: dict[str, AdapterView] = {}
        self._others: dict[str, list[AdapterView]] = {}
        self._uses: dict[int, AdapterUse] = {}
        self._reports: dict[int, bytes] = {}
        self.num_changes = 0

    def __len__(self) -> int:
        """How many names requests may use."""
        return len(self._served)

    def apply(self, message: AdaptersChanged) -> None:
        """Take in what the engine says."""
        for version, use in message.uses.items():
            if use is None:
                self._uses.pop(version, None)
                self._reports.pop(version, None)
            else:
                self._uses[version] = use
        self._reports |= message.reports
        for name, views in message.names.items():
            self.num_changes += 1
            self._set(name, views)

    def path(self, name: str) -> str | None:
        """Where a name that requests may use was loaded from; None if there is no such name."""
        view = self._served.get(name)
        return None if view is None else view.path

    def paths(self) -> dict[str, str]:
        """Name -> path of what requests may use, in the order of loading."""
        return {name: view.path for name, view in self._served.items()}

    def views(self) -> list[AdapterView]:
        """All of them: names in use, then what comes and goes. How they are used is added by :meth:`shown`."""
        return [
            *self._served.values(),
            *(view for views in self._others.values() for view in views),
        ]

    def shown(self, view: AdapterView) -> AdapterView:
        """A view as it is shown in a list, with the use of its version."""
        return view.used(self._uses.get(view.version or 0))

    def detail(self, view: AdapterView) -> AdapterDetail:
        """A view as it is shown alone, with the report."""
        report = self._reports.get(view.version or 0)
        shown = self.shown(view)
        return AdapterDetail.of(shown, None if report is None else msgspec.json.decode(report))

    def find(self, name: str) -> AdapterDetail:
        """One adapter. While a name has several versions, the one that a request would get.

        Raises:
            AdapterNotFoundError: nothing is called ``name``.
        """
        served = self._served.get(name)
        views = ([] if served is None else [served]) + self._others.get(name, [])
        if not views:
            raise never_loaded(name, self._served)
        return min(map(self.detail, views), key=lambda view: _STATES.index(view.state))

    def _set(self, name: str, views: Sequence[AdapterView]) -> None:
        others = [view for view in views if view.state != "loaded"]
        served = next((view for view in views if view.state == "loaded"), None)
        if served is None:
            self._served.pop(name, None)
        elif self._served.get(name) != served:
            self._served.pop(name, None)
            self._served[name] = served
        if others:
            self._others[name] = others
        else:
            self._others.pop(name, None)
