"""Bad input ends in one clear line and exit code 2, never in a traceback.

Everything a user can get wrong (a file, a row, a tensor, a flag) raises InputError with a message that
names the culprit and the way out. A bug still raises whatever it raises, so that a debugger stops there.
"""

import os
import sys


class InputError(ValueError):
    """Something outside the program is wrong; the message names it and says what to do."""


def run(main) -> None:
    """Call main(); turn InputError and OSError into one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`| head`): not an error; keep Python from flushing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
