"""Several coroutines at once: what ends them all."""

import asyncio

import pytest

from bacalhau_controllers.tasks import until_all, until_first


class Over(Exception):
    """One of them fails with this."""


async def forever() -> None:
    await asyncio.Event().wait()


async def ends_slowly() -> None:
    try:
        await forever()
    finally:
        for _ in range(3):
            await asyncio.sleep(0)


async def over() -> None:
    await asyncio.sleep(0)
    raise Over


async def test_the_end_of_one_is_the_end_of_all() -> None:
    ended: list[str] = []

    async def other() -> None:
        try:
            await forever()
        finally:
            ended.append("other")

    await until_first(one=asyncio.sleep(0), other=other())
    assert ended == ["other"]


async def test_what_was_raised_first_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def fails_late() -> None:
        try:
            await forever()
        finally:
            raise ValueError("late")

    with pytest.raises(Over):
        await until_first(late=fails_late(), over=over())
    assert [record.getMessage() for record in caplog.records] == ["Failed while it ended"]


async def test_all_of_them_end() -> None:
    ended: list[int] = []

    async def work(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        ended.append(turns)

    await until_all(work(turns) for turns in (3, 1, 2))
    assert ended == [1, 2, 3]
    await until_all(())
    with pytest.raises(Over):
        await until_all([ends_slowly(), over(), forever()])


@pytest.mark.parametrize("turns", range(10))
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_cancellation_is_never_lost_to_a_failure(turns: int, is_first: bool) -> None:
    """Whenever it comes: before, while and after one of them fails."""

    async def caller() -> None:
        try:
            if is_first:
                await until_first(over=over(), slow=ends_slowly())
            else:
                await until_all([over(), ends_slowly()])
        except Over:
            pass
        await forever()

    task = asyncio.create_task(caller())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()
