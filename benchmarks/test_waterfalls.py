"""What each technique brings, one switched on after another."""


def test_waterfall(waterfall_case, run_case):
    run_case(waterfall_case)
