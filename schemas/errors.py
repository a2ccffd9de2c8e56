"""Conditions that an operator has to correct; every one ends a command with exit code 78."""


class ConfigurationError(Exception):
    """Something outside the program is set wrongly: correct what the message names, then start again."""


class SchemaMismatch(ConfigurationError):
    """The database is older or newer than this code: run `innerloop migrate`, or install the newer innerloop."""


class WrongRole(ConfigurationError):
    """The login has other rights than the command needs: give the command a login of the role it names."""


class MappingInvalid(ConfigurationError):
    """The mapping file of a foreign clickstream is not usable: correct the entry that the message names."""
