"""What a cluster lacks for a run, and why an actor died, in words. Pure: no cluster is started."""

import pytest

from rlsys.cluster import Demand, shortage, why_it_died

LEARNERS = Demand(what="learner rank", count=2, cpus=1, gpus=1)
ACTORS = Demand(what="rollout actor", count=4, cpus=2)


def lacks(demands: list[Demand], *nodes: dict[str, float]) -> str | None:
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    return shortage(demands, total, nodes)


def test_a_cluster_that_has_exactly_what_is_asked_lacks_nothing() -> None:
    assert lacks([LEARNERS, ACTORS], {"CPU": 10, "GPU": 2}) is None
    assert lacks([LEARNERS, ACTORS], {"CPU": 4, "GPU": 1}, {"CPU": 6, "GPU": 1}) is None


def test_what_is_asked_and_what_is_there_are_said() -> None:
    # 2 x 1 + 4 x 2 CPUs and 2 x 1 GPUs are asked.
    assert lacks([LEARNERS, ACTORS], {"CPU": 8, "GPU": 2, "memory": 1e9}) == (
        "the run asks for 10 CPU, 2 GPU [2 learner rank x (1 CPU, 1 GPU); 4 rollout actor x (2 CPU)] "
        "but 8 CPU, 2 GPU are there"
    )


def test_an_actor_never_spans_nodes() -> None:
    wide = Demand(what="rollout actor", count=1, cpus=1, gpus=4)
    found = lacks([wide], {"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2})
    assert found == "no node has 1 CPU, 4 GPU for one of the rollout actor"


def test_one_node_must_have_all_that_an_actor_needs() -> None:
    both = Demand(what="learner rank", count=1, cpus=1, resources={"learner": 1})
    assert "no node has" in str(lacks([both], {"CPU": 4}, {"learner": 1}))
    assert lacks([both], {"CPU": 4}, {"CPU": 1, "learner": 1}) is None


def test_custom_resources_are_counted_like_any_other() -> None:
    demand = Demand(what="rollout actor", count=3, cpus=1, resources={"rollout": 1})
    found = lacks([demand], {"CPU": 8, "rollout": 2})
    assert found is not None
    assert "asks for 3 CPU, 3 rollout" in found
    assert found.endswith("but 8 CPU, 2 rollout are there")


def test_a_resource_that_no_node_knows_is_named() -> None:
    assert "1 GPU" in str(lacks([LEARNERS], {"CPU": 64}))


def test_fractions_add_up_without_rounding_errors() -> None:
    tenths = Demand(what="reward actor", count=10, cpus=0.1)
    assert lacks([tenths], {"CPU": 1}) is None
    assert lacks([tenths, Demand(what="tool actor", count=1, cpus=0.1)], {"CPU": 1}) is not None


def test_demands_for_the_same_resource_are_added_up() -> None:
    assert lacks([ACTORS], {"CPU": 8}) is None
    assert lacks([ACTORS, ACTORS], {"CPU": 15}) is not None


@pytest.mark.parametrize("nodes", [[], [{}], [{"CPU": 0.0}]])
def test_an_empty_cluster_lacks_everything(nodes: list[dict[str, float]]) -> None:
    assert lacks([ACTORS], *nodes) == "no node has 2 CPU for one of the rollout actor"


def test_amounts_of_zero_are_not_asked_for() -> None:
    assert ACTORS.each == {"CPU": 2}
    assert Demand(what="anything", count=1).each == {}


# --- why an actor died -----------------------------------------------------------------------------------------------

ABOUT = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RolloutActor\n\tactor_id: ff883bdf\n"
    "\tpid: 9111\n\tnamespace: 3b9d596e\n\tip: 192.0.2.2\n"
)


def test_a_process_that_was_killed_is_told_in_plain_words() -> None:
    told = ABOUT + (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file."
    )
    assert why_it_died(told).startswith(
        "its process (9111 on 192.0.2.2) ended without a word: it was killed or crashed"
    )


def test_a_node_that_died_and_an_error_at_birth_are_told_as_they_are() -> None:
    node = "its node has died. Node Id: 2c88 the actor's node was terminated unexpectedly: health check failed"
    assert why_it_died(f"{ABOUT}The actor died because {node}") == node
    birth = "The actor died because of an error raised in its creation task, ValueError: no such model"
    assert why_it_died(birth) == birth
    assert len(why_it_died(f"{birth} {'x' * 5000} KeyError: 'the cause'")) < 1000
    assert why_it_died(f"{birth} {'x' * 5000} KeyError: 'the cause'").endswith("KeyError: 'the cause'")
