"""Names for containers that were given none: two words, random, easy to say."""

from __future__ import annotations

import os

_FIRST = (
    "amber ample brisk calm candid clear cosy crisp dapper deft eager early fair fleet fond frank fresh gentle glad "
    "golden grand hale handy hardy honest jolly keen kind level lively lucid lucky merry mild neat nimble noble "
    "placid plain prime proud quick quiet rapid ready serene sharp silent smooth snug sober solid spry stable steady "
    "still stout sunny swift tidy trim vivid warm wise witty"
)
_SECOND = (
    "alder anchor aspen badger barge basin beacon birch bobbin bramble bridge brook canal canyon cedar chisel clover "
    "comet compass coral cove crane delta ember falcon fern finch fjord forge garnet gable glacier hammer harbor hazel "
    "heron hinge island jetty juniper kestrel kiln lagoon lantern larch ledger linden loom maple marten meadow mill "
    "mortar otter paddle pebble pier pine plover prairie quarry quill raven reef ridge river rowan rudder sail sickle "
    "sparrow spruce summit swan tern thistle timber trellis tundra valley walnut willow"
)


def random_name() -> str:
    """Such as `calm_heron_3f9a`; four digits keep thousands of containers apart."""
    raw = os.urandom(4)
    first, second = _FIRST.split(), _SECOND.split()
    return f"{first[raw[0] % len(first)]}_{second[raw[1] % len(second)]}_{raw[2:].hex()}"
