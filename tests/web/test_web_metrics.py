"""What a server counts, as Prometheus reads it."""

import pytest

from mg_fast.web.sessions import AnsweredTurn, AnswerFigures, AskedQuestion

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: `make test` installs it")


def values(metrics):
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_counts():
    from mg_fast.web.metrics import ServerMetrics

    metrics = ServerMetrics()
    figures = AnswerFigures(0.2, 0.3, 2.0, 10.0, 17, 180, 120, "stop")
    turn = AnsweredTurn(AskedQuestion("a secret", ("a", "b")), "a secret", figures, (("name", "prompt"),))
    metrics.asked("ok", turn, 2)
    metrics.asked("error", None, 1)
    metrics.refused("ask")
    metrics.done("explain", "ok")
    metrics.uploaded(taken=True)
    metrics.uploaded(taken=False)
    metrics.watch("waiting", "Questions that wait.", lambda: 7)
    found = values(metrics)
    assert {outcome: found["mg_fast_web_requests_total", "ask", outcome] for outcome in ("ok", "refused", "error")} == {
        "ok": 1,
        "refused": 1,
        "error": 1,
    }
    assert found["mg_fast_web_requests_total", "ask", "cancelled"] == 0
    assert found["mg_fast_web_requests_total", "explain", "ok"] == found["mg_fast_web_pictures_total", "drawn"] == 1
    tokens = [found["mg_fast_web_tokens_total", kind] for kind in ("prompt", "cached", "new")]
    assert tokens == [180, 120, 17] and found["mg_fast_web_pictures_total", "asked"] == 3
    assert found["mg_fast_web_time_to_first_token_seconds_bucket", "0.5"] == 1
    assert found["mg_fast_web_time_to_first_token_seconds_bucket", "0.25"] == 0
    assert found["mg_fast_web_waiting",] == 7 and found["mg_fast_web_answer_seconds_sum",] == 2.0
    assert found["process_resident_memory_bytes",] > 2**20
    assert "secret" not in metrics.text().decode()
    # Two servers in one process count for themselves.
    assert values(ServerMetrics())["mg_fast_web_requests_total", "ask", "ok"] == 0
