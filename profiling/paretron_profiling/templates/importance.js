// ---- importance: what a layer is worth, and how it is spread over units
const SHADES = [[0, "#f7fbff"], [0.33, "#9ecae1"], [0.66, "#3182bd"], [1, "#08306b"]];
const AXES = { heads: "attention heads", ffn: "MLP neurons", experts: "experts", moe_ffn: "neurons of experts", hidden: "embedding channels" };

function layerBars({ metric, values }) {
  const layers = values.map((_, i) => i);
  tall("importance", 300);
  draw("importance", [{
    type: "bar", x: layers, y: values, marker: { color: "#0b66b2" },
    hovertemplate: values.map((v, i) => hover([`layer ${i}`, `${metric}: ${number(v)}`])),
  }], { margin: { l: 64, r: 16, t: 12, b: 48 }, xaxis: axis("layer", { tick0: 0, dtick: Math.ceil(values.length / (narrow() ? 8 : 24)) }), yaxis: axis("", { nticks: 5 }) });
  const ranked = layers.slice().sort((a, b) => (values[a] ?? Infinity) - (values[b] ?? Infinity));
  const said = `Least: layer ${ranked.slice(0, 3).join(", ")}; most: layer ${ranked.slice(-1)}.`;
  element("importance-note").textContent = `${metric[0].toUpperCase()}${metric.slice(1)}, by layer. ${said}`;
  describe("importance", `${metric} by layer: ` + values.map((v, i) => `${i}: ${number(v)}`).join(", ") + ".");
}

function heatMap({ axis: what, units, places, values }) {
  const columns = values[0].length, name = AXES[what] || what;
  const layer = (place) => (place.match(/\.layers\.(\d+)\./) || [])[1];
  const rows = places.map((place) => (layer(place) == null ? place : `layer ${layer(place)} ${place.split(".").slice(-1)}`));
  tall("importance", Math.max(220, Math.min(560, 90 + 16 * places.length)));
  draw("importance", [{
    type: "heatmap", z: values, colorscale: SHADES, zmin: 0, zmax: 1, xgap: 0.5, ygap: 0.5,
    colorbar: { thickness: 10, len: 1, outlinewidth: 0, tickformat: ".0%", tickfont: { color: SOFT, size: 11 } },
    hovertemplate: values.map((row, r) => row.map((v, c) => hover([rows[r],
      columns < units ? `units ${percent(c / columns)} to ${percent((c + 1) / columns)} by rank` : `rank ${c + 1}`,
      `${percent(v)} of the most important`]))),
  }], {
    margin: { l: 8, r: 8, t: 8, b: 48 },
    xaxis: axis(`${units} ${plain(name)}, the most important first`, { showgrid: false, showticklabels: false }),
    yaxis: axis("", { autorange: "reversed", showgrid: false, nticks: 14, tickfont: { color: SOFT, size: 11 },
      tickvals: places.map((_, i) => i).filter((i) => i % Math.ceil(places.length / 14) === 0),
      ticktext: rows.filter((_, i) => i % Math.ceil(places.length / 14) === 0).map((t) => plain(cut(t, narrow() ? 10 : 26)) + " ") }),
  });
  element("importance-note").textContent = `${units} ${name} in ${places.length} places, each row by rank, as parts of the largest; a row that stays dark has little to spare.`;
  const half = values.map((row) => row.slice(Math.floor(columns / 2)).reduce((a, b) => a + (b ?? 0), 0) / Math.max(1e-12, row.reduce((a, b) => a + (b ?? 0), 0)));
  describe("importance", `Heat map of ${name}. Share of the importance that the lesser half of the units has: ` +
    rows.map((row, i) => `${row} ${percent(half[i])}`).join(", ") + ".");
}

function setUpImportance() {
  const select = element("importance-what");
  if (!select) return;
  const { layers, axes } = data.importance;
  const views = [...layers.map((l) => [`layers: ${l.metric}`, () => layerBars(l)]),
    ...axes.map((a) => [AXES[a.axis] || a.axis, () => heatMap(a)])];
  fill(select, views.map(([name]) => name[0].toUpperCase() + name.slice(1)));
  const show = () => views[Number(select.value)][1]();
  select.addEventListener("change", show);
  redraw.push(show);
}
