"""Every workflow in a real browser: it opens without a red node, is the graph of `workflows/api`, and runs."""

from __future__ import annotations

import json
import os
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from comfy_server import PACK, Host

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
# The first start of the frontend otherwise covers the page with a tour and a list of templates.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, "LiteGraph.Canvas.MinFontSizeForLOD": 0}
RED = "() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type] || n.has_errors).map(n => n.type)"
QUEUE = """() => new Promise(async resolve => {
    let previews = 0;
    for (const kind of ['b_preview', 'b_preview_with_metadata'])
        app.api.addEventListener(kind, () => { previews += 1; });
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(kind, event => resolve([kind, {...event.detail, previews}]), {once: true});
    await app.queuePrompt(0, 1);
    if (Object.keys(app.lastNodeErrors || {}).length) resolve(['refused', app.lastNodeErrors]);
})"""
FIT = """async () => {
    app.canvas.low_quality_zoom_threshold = 0;
    app.canvas.min_font_size_for_lod = 0;
    await app.extensionManager.command.execute('Comfy.Canvas.FitView');
}"""


@pytest.fixture(scope="module")
def page(host: Host, chromium: tuple[Any, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The frontend of the running host."""
    for name, value in SETTINGS.items():
        host.post(f"api/settings/{name}", value)
    program, settings = chromium
    profile, viewport = str(tmp_path_factory.mktemp("profile")), {"width": 1600, "height": 900}
    context = program.launch_persistent_context(profile, viewport=viewport, device_scale_factor=2, **settings)
    page = context.pages[0]
    local = {"127.0.0.1", "localhost"}
    page.route(
        "**/*", lambda route: route.continue_() if urlparse(route.request.url).hostname in local else route.abort()
    )
    page.goto(host.address, wait_until="domcontentloaded")
    page.wait_for_function("() => window.app && app.graph && app.vueAppReady && app.extensionManager")
    page.wait_for_timeout(1500)
    yield page
    context.close()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens_and_runs(page: Any, workflow: Path) -> None:
    page.evaluate("graph => app.loadGraphData(graph)", json.loads(workflow.read_text()))
    page.wait_for_timeout(1000)
    assert page.evaluate(RED) == []
    graph = page.evaluate("async () => (await app.graphToPrompt()).output")
    written = json.loads((workflow.parent / "api" / workflow.name).read_text())
    assert {name: (n["class_type"], n["inputs"]) for name, n in graph.items()} == {
        name: (n["class_type"], n["inputs"]) for name, n in written.items()
    }
    ended, told = page.evaluate(QUEUE)
    assert ended == "execution_success", told
    assert told["previews"] > 0
    if folder := os.environ.get("VIDEOFACTORY_SCREENSHOTS"):
        page.evaluate(FIT)
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"{workflow.stem}.png"))


SHOW = """() => {
    const shown = LiteGraph.createNode('PreviewImage');
    app.graph.add(shown);
    app.graph._nodes[0].connect(0, shown, 0);
}"""


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_a_node_that_runs(host: Host, page: Any, blueprint: Path) -> None:
    page.evaluate("graph => app.loadGraphData(graph)", json.loads(blueprint.read_text()))
    page.wait_for_timeout(1000)
    assert page.evaluate("() => app.graph._nodes.map(node => node.title)") == [blueprint.stem]
    page.evaluate(SHOW)
    assert page.evaluate(RED) == []
    ended, told = page.evaluate(QUEUE)
    assert ended == "execution_success", told
    try:
        offered = host.get("global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this host is older than blueprints")
    assert blueprint.stem in {entry["name"] for entry in offered.values()}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_listed_with_a_picture_and_repeats_itself(host: Host, workflow: Path) -> None:
    listed = host.get("workflow_templates")
    assert workflow.stem in listed["VideoFactory"]
    assert workflow.with_suffix(".jpg").read_bytes().startswith(b"\xff\xd8\xff")
    nodes = json.loads(workflow.read_text())["nodes"]
    for node in nodes:
        assert "randomize" not in (node.get("widgets_values") or [])
        if node["type"].startswith("VideoFactory"):
            assert node["properties"]["cnr_id"] == "videofactory"
