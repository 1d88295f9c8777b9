"""What failed on a cluster: our own errors and Ray's limits, out of the wrappers in which Ray brings them."""

from collections.abc import Iterator

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from aceray.errors import AcerayError, ClusterError

_LIMITS = {
    OutOfMemoryError: "the memory of a node is used up: use fewer workers or trials a node, lower train.batch or "
    "data.box, or end what else runs there; then resume",
    ObjectStoreFullError: "Ray's shared memory is full: lower data.box, or start Ray with a larger object store",
    OutOfDiskError: "Ray moves to disk what its shared memory cannot hold, and that disk is full: free some space in "
    "its folder (RAY_TMPDIR, /tmp/ray), or start Ray with a larger object store",
}


def known_error(error: BaseException | None) -> AcerayError | None:
    """What the user can act on inside the wrappers in which Ray brings an error from another process, or None."""
    return own_error(error) or _limit_error(error)


def own_error(error: BaseException | None) -> AcerayError | None:
    """The AcerayError inside the wrappers, or None."""
    # Ray's wrapper of a task's error is made to look like an instance of its class, with another message
    own = (each for each in _unwrapped(error) if isinstance(each, AcerayError) and not isinstance(each, RayError))
    return next(own, None)


def _limit_error(error: BaseException | None) -> ClusterError | None:
    for found in _unwrapped(error):
        for kind, advice in _LIMITS.items():
            if isinstance(found, kind) and not isinstance(found, RayTaskError):
                return ClusterError(f"{' '.join(str(found).split())[:160]} …; {advice}")
    return None


def _unwrapped(error: BaseException | None) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop()
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        waiting += [error.__cause__, getattr(error, "cause", None), getattr(error, "controller_failure", None)]
        waiting += [getattr(error, "_base_exc", None), getattr(error, "health_check_failure", None)]
        waiting += getattr(error, "worker_failures", {}).values()
