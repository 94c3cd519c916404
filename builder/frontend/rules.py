"""The lint rules as data: BuildKit's names and descriptions, and the wording of a finding.

`lint` decides when a rule applies. A name here is a promise to `# check=skip=NAME`.
"""

from __future__ import annotations

from layers.values import NamedTuple


class Rule(NamedTuple):
    """`detail` is a format string. An experimental rule reports only where a file asks for it."""

    name: str
    description: str
    detail: str
    experimental: bool = False


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "ConsistentInstructionCasing",
            "All commands within the Dockerfile should use the same casing (either upper or lower)",
            "Command '{command}' should match the case of the command majority ({casing})",
        ),
        Rule(
            "CopyIgnoredFile",
            "Attempting to Copy file that is excluded by .dockerignore",
            'Attempting to {command} file "{file}" that is excluded by {ignore_file}',
        ),
        Rule(
            "DuplicateStageName",
            "Stage names should be unique",
            'Duplicate stage name "{stage}", stage names should be unique',
        ),
        Rule(
            "ExposeInvalidFormat",
            "IP address and host-port mapping should not be used in EXPOSE instruction. "
            "This will become an error in a future release",
            "EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'",
        ),
        Rule(
            "ExposeProtoCasing",
            "Protocol in EXPOSE instruction should be lowercase",
            "Defined protocol '{port}' in EXPOSE instruction should be lowercase",
        ),
        Rule(
            "FromAsCasing",
            "The 'as' keyword should match the case of the 'from' keyword",
            "'{as_}' and '{from_}' keywords' casing do not match",
        ),
        Rule(
            "FromPlatformFlagConstDisallowed",
            "FROM --platform flag should not use a constant value",
            'FROM --platform flag should not use constant value "{platform}"',
        ),
        Rule(
            "InvalidBaseImagePlatform",
            "Base image platform does not match expected target platform",
            'Base image {image} was pulled with platform "{actual}", expected "{expected}" for current build',
        ),
        Rule(
            "InvalidDefaultArgInFrom",
            "Default value for global ARG results in an empty or invalid base image name",
            "Default value for ARG {image} results in empty or invalid base image name",
        ),
        Rule(
            "InvalidDefinitionDescription",
            "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. "
            "If this is not intended to be a description comment, add an empty line or comment between the "
            "instruction and the comment.",
            "Comment for {command} should follow the format: `# {name} <description>`",
            experimental=True,
        ),
        Rule(
            "JSONArgsRecommended",
            "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals",
            "JSON arguments recommended for {command} to prevent unintended behavior related to OS signals",
        ),
        Rule(
            "LegacyKeyValueFormat",
            "Legacy key/value format with whitespace separator should not be used",
            '"{command} key=value" should be used instead of legacy "{command} key value" format',
        ),
        Rule(
            "MaintainerDeprecated",
            "The MAINTAINER instruction is deprecated, use a label instead to define an image author",
            "Maintainer instruction is deprecated in favor of using label",
        ),
        Rule(
            "MultipleInstructionsDisallowed",
            "Multiple instructions of the same type should not be used in the same stage",
            "Multiple {command} instructions should not be used in the same stage "
            "because only the last one will be used",
        ),
        Rule(
            "NoEmptyContinuation",
            "Empty continuation lines will become errors in a future release",
            "Empty continuation line",
        ),
        Rule(
            "RedundantTargetPlatform",
            "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior",
            "Setting platform to predefined {platform} in FROM is redundant as this is the default behavior",
        ),
        Rule(
            "ReservedStageName",
            "Reserved words should not be used as stage names",
            'Stage name should not use the same name as reserved stage "{stage}"',
        ),
        Rule(
            "SecretsUsedInArgOrEnv",
            "Sensitive data should not be used in the ARG or ENV commands",
            'Do not use ARG or ENV instructions for sensitive data ({command} "{name}")',
        ),
        Rule(
            "StageNameCasing",
            "Stage names should be lowercase",
            "Stage name '{stage}' should be lowercase",
        ),
        Rule(
            "UndefinedArgInFrom",
            "FROM command must use declared ARGs",
            "FROM argument '{name}' is not declared{suggestion}",
        ),
        Rule(
            "UndefinedVar",
            "Variables should be defined before their use",
            "Usage of undefined variable '${name}'{suggestion}",
        ),
        Rule(
            "WorkdirRelativePath",
            "Relative workdir without an absolute workdir declared within the build can have unexpected results "
            "if the base image changes",
            'Relative workdir "{path}" can have unexpected results if the base image changes',
        ),
    )
}
