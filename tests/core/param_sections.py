"""Every section of params.yaml by its name -> the class that reads it."""

import importlib
import pkgutil

import kvcompress
from kvcompress.core.params import SectionParams

for module in pkgutil.walk_packages(kvcompress.__path__, "kvcompress."):
    if module.name.endswith("params"):
        importlib.import_module(module.name)


def below(base: type[SectionParams]) -> dict[str, type[SectionParams]]:
    found = {base.section: base} if "section" in vars(base) else {}
    for each in base.__subclasses__():
        found |= below(each) if each.__module__.startswith("kvcompress.") else {}
    return found


CLASSES = below(SectionParams)
