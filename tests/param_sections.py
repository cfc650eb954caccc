"""Every section of params.yaml by its name -> the class that reads it."""

import importlib
import pkgutil

import kvcompress.params
from kvcompress.core.params import SectionParams

for module in pkgutil.iter_modules(kvcompress.params.__path__):
    importlib.import_module(f"kvcompress.params.{module.name}")


def below(base: type[SectionParams]) -> dict[str, type[SectionParams]]:
    found = {base.section: base} if "section" in vars(base) else {}
    for each in base.__subclasses__():
        found |= below(each) if each.__module__.startswith("kvcompress.") else {}
    return found


CLASSES = below(SectionParams)
