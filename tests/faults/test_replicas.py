"""The promise as the README words it: the worker and the replica die, the official client resumes elsewhere, nothing is missing."""

from tests.faults.replicas import kill_and_resume


def test_the_official_client_resumes_on_another_replica_after_a_double_kill(cluster, official):
    story = kill_and_resume(cluster, official)
    print(f"FIGURE recovery {story.recovery_s:.2f} s")
