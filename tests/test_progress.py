from sae_lib.progress import clock, progress


def test_a_batch_prints_lines_now_and_then(capsys):
    with progress(100, "training", mode="batch", unit="steps", every=0.0) as bar:
        bar.advance(40, "loss 0.5")
        bar.advance(60)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training: 40 of 100 steps (40%)") and lines[0].endswith("left, loss 0.5")
    assert len(lines) == 3 and "100 steps in" in lines[2]


def test_a_person_sees_a_bar(capsys):
    with progress(10, "extracting", mode="live", initial=4) as bar:
        bar.advance(6, "x")
    assert bar.done == 10 and "extracting" in capsys.readouterr().err


def test_what_was_there_before_is_not_counted_in_the_rate(capsys):
    with progress(10, "a", mode="batch", initial=10) as bar:
        pass
    assert bar.rate == 0


def test_durations_are_quick_to_read():
    assert [clock(s) for s in (3.4, 89, 185, 7800)] == ["3 s", "89 s", "3:05 min", "2:10 h"]
