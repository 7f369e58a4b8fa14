"""A contract for import-linter: in a folder of plug-ins, nothing but the folder's own package knows a plug-in by name.

A plug-in is a module whose name has no leading underscore. Plug-ins may import what they share (names with an underscore);
neither they nor what they share may import a plug-in. No list of names is needed, so that a new file is checked too.
"""

from __future__ import annotations

from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class PluginFolders(Contract):
    """``type = "plugin_folders"`` in pyproject.toml, with ``folders`` as dotted names."""

    type_name = "plugin_folders"
    folders = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Broken by each import of a plug-in from inside its own folder."""
        broken = [
            {"importer": importer, "imported": plugin, "lines": [line["line_number"] for line in details]}
            for folder in self.folders
            for plugin in sorted(graph.find_children(str(folder)))
            if not plugin.rpartition(".")[2].startswith("_")
            for importer in sorted(graph.find_modules_that_directly_import(plugin))
            if importer.startswith(f"{folder}.") and not importer.startswith(f"{plugin}.")
            if (details := graph.get_import_details(importer=importer, imported=plugin))
        ]
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line for each such import."""
        imports: list[dict[str, Any]] = check.metadata["broken"]
        for found in imports:
            output.print_error(
                f"- {found['importer']} imports the plug-in {found['imported']} (line {found['lines']})"
            )
