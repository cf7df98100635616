"""Signals wait for the end of a block, and are then handled as they would have been."""

import os
import signal
import threading

import pytest

from lr_callback.common.interrupts import held, live
from lr_callback.common.processes import Processes

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGUSR1")


def send(signum):
    os.kill(os.getpid(), signum)  # its handler runs before the next line


@pytest.fixture
def handled():
    """Return the signals that a handler was called for."""
    found = []
    former = signal.signal(signal.SIGUSR1, lambda signum, frame: found.append(signum))
    yield found
    signal.signal(signal.SIGUSR1, former)


def test_signal_waits_for_the_end_of_the_block_and_comes_once(handled):
    with held():
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        assert handled == []
    assert handled == [signal.SIGUSR1]
    send(signal.SIGUSR1)
    assert len(handled) == 2


def test_interrupt_is_raised_at_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        send(signal.SIGINT)
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), held():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("it was to be raised")


def test_blocks_inside_of_one_another_are_one(handled):
    with held():
        with held():
            send(signal.SIGUSR1)
        assert handled == []
    assert handled


def test_error_of_the_block_is_not_lost_and_handlers_are_back(handled):
    former = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ArithmeticError), held():
        send(signal.SIGUSR1)
        raise ArithmeticError
    assert handled and signal.getsignal(signal.SIGUSR1) is former


def test_long_part_lets_signals_through_first_those_that_came(handled):
    with held():
        send(signal.SIGUSR1)
        with live():
            assert len(handled) == 1
            send(signal.SIGUSR1)
            assert len(handled) == 2
        send(signal.SIGUSR1)
        assert len(handled) == 2
    assert len(handled) == 3


def test_part_that_lets_one_signal_through_keeps_the_others(handled):
    with held():
        with pytest.raises(KeyboardInterrupt), live(signal.SIGINT):
            send(signal.SIGUSR1)
            send(signal.SIGINT)
            pytest.fail("it was to be raised")
        assert handled == []
    assert handled


def test_nothing_waits_outside_of_a_block(handled):
    with live():
        send(signal.SIGUSR1)
    assert handled


def test_other_threads_do_without(handled):
    errors = []

    def work():
        try:
            with held(), live():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with held():
        thread.start()
        thread.join()
        send(signal.SIGUSR1)
        assert handled == []
    assert errors == [] and handled


def test_long_work_of_one_process_can_be_interrupted():
    def make():
        send(signal.SIGINT)
        pytest.fail("it was to be raised")

    with held(), pytest.raises(KeyboardInterrupt):
        Processes().gather(make, long=True)
