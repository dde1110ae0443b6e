"""The one exception type that means "you can fix this"."""


class UserError(ValueError):
    """Something the user can put right: says what is wrong, where, and what to do.

    `llama_ray.job` prints its message without a traceback, as the last line.
    """
