"""What surrounds the networks: data, images to disk, distances, imports, a run's iteration."""


def test_pipeline(pipeline_case, run_case):
    run_case(pipeline_case)
