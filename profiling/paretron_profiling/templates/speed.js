// ---- speeds of one workload as bars, and how many times faster than the teacher
function bars(id, w, key, what, unit) {
  const points = measured(w).filter((p) => p.speed[key] != null).reverse();
  tall(id, 44 + 46 * Math.max(1, points.length));
  element(`${id}-title`).textContent = `${what}, ${unit}`;
  const most = Math.max(0, ...points.map((p) => range(p.speed, key)[1]));
  draw(id, points.map(({ model, speed }, row) => ({
    type: "bar", orientation: "h", x: [speed[key]], y: [row], width: 0.62,
    marker: { color: model.colour }, error_x: whisker(speed, key, "#11151c"),
    hovertemplate: hover([model.label, `${number(speed[key])} ${unit}`,
      `${range(speed, key).map((v) => number(v)).join(" to ")}`]),
  })), {
    margin: { l: 8, r: 8, t: 4, b: 30 }, barmode: "overlay",
    annotations: points.map(({ speed }, row) => ({ x: range(speed, key)[1], y: row, xanchor: "left",
      xshift: 7, showarrow: false, text: number(speed[key]), font: { size: 13, color: INK } })),
    xaxis: axis("", { range: [0, most * (narrow() ? 1.65 : 1.2)], nticks: 4, tickangle: 0 }),
    yaxis: rowAxis(points.map((p) => short(p.model.label))),
  });
  describe(id, `${what} in ${unit}. ` +
    points.map(({ model, speed }) => `${model.label}: ${number(speed[key])}`).reverse().join("; ") + ".");
}

function ratios(w) {
  const rows = [];
  for (const model of data.models.filter((m) => !m.teacher))
    for (const rule of ["same_batch", "same_memory", "same_latency"]) {
      const found = ratio(model.name, w, rule);
      if (found && found.ratio != null) rows.push({ model, found });
    }
  rows.reverse();
  const none = element("no-ratios");
  if (none) none.hidden = rows.length > 0;
  if (element("ratios")) element("ratios").hidden = rows.length === 0;
  if (!rows.length) return;
  const what = ({ model, found }) => `${plain(cut(model.label, narrow() ? 11 : 26))}, ${found.rule_words}`;
  const batches = ({ found }) => `${load(found.mode, found.load)} against ${found.teacher_load}`;
  const name = (row) => `${what(row)}<br><span style="color:${SOFT};font-size:12px">${batches(row)}</span>`;
  const above = narrow() ? rows.map((row, at) => ({ xref: "paper", x: 0, y: at, xanchor: "left", yshift: 19, xshift: 4,
    showarrow: false, text: `${what(row)}, <span style="color:${SOFT}">${batches(row)}</span>`, font: { size: 12, color: INK },
    bgcolor: "rgba(255,255,255,0.8)" })) : [];
  const highest = Math.max(1, ...rows.map((r) => r.found.interval[1] ?? r.found.ratio));
  const lowest = Math.min(1, ...rows.map((r) => r.found.interval[0] ?? r.found.ratio));
  tall("ratios", 70 + 54 * Math.max(1, rows.length));
  const high = (r) => r.found.interval[1] ?? r.found.ratio, low = (r) => r.found.interval[0] ?? r.found.ratio;
  draw("ratios", rows.map((row, at) => ({
    x: [row.found.ratio], y: [at], mode: "markers",
    error_x: { type: "data", symmetric: false, array: [high(row) - row.found.ratio],
      arrayminus: [row.found.ratio - low(row)], color: row.model.colour, thickness: 2.5, width: 7 },
    marker: { color: row.found.rule === "same_batch" ? row.model.colour : "#fff", symbol: row.model.symbol, size: 13,
      line: { color: row.model.colour, width: 2.5 } },
    hovertemplate: hover([row.model.label, `${times(row.found.ratio)} (${row.found.rule_words})`, row.found.interval_words]),
  })), {
    margin: { l: 8, r: 8, t: 8, b: 34 },
    annotations: [...above, { x: 1, yref: "paper", y: narrow() ? 0 : 1, xanchor: "left", yanchor: narrow() ? "bottom" : "top",
      xshift: 4, showarrow: false, text: "teacher", font: { size: 12, color: SOFT } },
    ...rows.map((row, at) => ({ x: high(row), y: at, xanchor: "left", xshift: 12,
      showarrow: false, text: `<b>${times(row.found.ratio)}</b>`, font: { size: 14, color: row.model.colour } }))],
    shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: "#7b8593", width: 1.5, dash: "dash" } }],
    xaxis: axis("", { range: [Math.max(0, lowest - 0.12 * (highest - lowest) - 0.03), highest + (narrow() ? 0.4 : 0.24) * (highest - lowest) + 0.05],
      ticksuffix: "×", nticks: 6 }),
    yaxis: rowAxis(rows.map(name), { showticklabels: !narrow(), range: [-0.6, rows.length - (narrow() ? 0.2 : 0.4)] }),
  });
  describe("ratios", "Speed-up over the teacher. " + rows.map((r) =>
    `${r.model.label}, ${r.found.rule_words}, ${load(r.found.mode, r.found.load)} against ${r.found.teacher_load}: ${times(r.found.ratio)}`).reverse().join("; ") + ".");
}

function doubts(w) {
  const flags = new Set(measured(w).flatMap((p) => p.speed.flags));
  for (const place of document.querySelectorAll("[data-doubt]"))
    place.textContent = flags.size ? "Doubtful: " + [...flags].map((f) => data.flags[f] || f).join(", ") + "." : "";
}

// Weights and KV cache of full requests, at the loads of this workload.
function memory(w) {
  const points = measured(w).filter((p) => p.speed.memory != null).reverse();
  const figure = element("memory");
  if (!figure) return;
  element("memory-none").hidden = points.length > 0;
  figure.hidden = points.length === 0;
  if (!points.length) return;
  tall("memory", 56 + 46 * points.length);
  const unit = Math.max(...points.map((p) => p.speed.memory)) >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
  const part = (value, { model }, row, opacity, what) => ({
    type: "bar", orientation: "h", x: [value / unit[0]], y: [row], width: 0.62,
    marker: { color: model.colour, opacity, line: { color: model.colour, width: 1 } },
    hovertemplate: hover([model.label, `${what} ${bytes(value)}`]),
  });
  const most = Math.max(...points.map((p) => p.speed.memory)) / unit[0];
  draw("memory", points.flatMap((p, row) => [
    part(p.model.weights, p, row, 1, "weights"), part(p.speed.memory - p.model.weights, p, row, 0.35, "KV cache"),
  ]), {
    barmode: "stack", margin: { l: 8, r: 8, t: 4, b: 44 },
    annotations: points.map((p, row) => ({ x: p.speed.memory / unit[0], y: row, xanchor: "left", xshift: 7,
      showarrow: false, text: bytes(p.speed.memory), font: { size: 13, color: INK } })),
    xaxis: axis(unit[1], { range: [0, most * (narrow() ? 1.6 : 1.2)], nticks: 5 }),
    yaxis: rowAxis(points.map((p) => short(p.model.label))),
  });
  describe("memory", "Memory of weights and KV cache. " + points.map((p) =>
    `${p.model.label}: ${bytes(p.model.weights)} and ${bytes(p.speed.memory - p.model.weights)}`).reverse().join("; ") + ".");
}
