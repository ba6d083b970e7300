"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byName = new Map(data.models.map((m) => [m.name, m]));
  const INK = "#1d232e", SOFT = "#545d6b", LINE = "#e4e7ec";
  const narrow = () => window.innerWidth < 560;

  // Plotly reads a little HTML in its texts; names must not be read as such.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text) => {
    const room = narrow() ? 16 : 26;
    return plain(text.length > room ? text.slice(0, room - 1) + "…" : text);
  };
  const number = (x, digits = 3) =>
    x == null ? "–"
      : Math.abs(x) >= 10 ** (digits - 1) ? Math.round(x).toLocaleString("en-US")
        : String(Number(x.toPrecision(digits)));
  // As in the text: close students must not look equal.
  const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(Math.abs(x) < 0.05 ? 3 : 2);
  const times = (x) => x.toFixed(2) + "×";

  const base = (extra) => ({
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: INK },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    margin: { l: 64, r: 16, t: 12, b: 48 }, hovermode: "closest", dragmode: false,
    hoverlabel: { bgcolor: "#fff", bordercolor: "#8b95a3", font: { color: INK, size: 13 }, align: "left" },
    ...extra,
  });
  const axis = (title, extra) => ({
    title: { text: title, font: { size: 13, color: SOFT }, standoff: 10 }, gridcolor: LINE, zeroline: false,
    linecolor: "#b9c0ca", tickfont: { color: SOFT }, fixedrange: true, automargin: true, ...extra,
  });
  const CONFIG = { displayModeBar: false, responsive: true, displaylogo: false };
  const draw = (id, traces, layout) => {
    const target = document.getElementById(id);
    if (target) Plotly.react(target, traces, base(layout), CONFIG);
  };
  const describe = (id, text) => document.getElementById(id)?.setAttribute("aria-label", text);
  const hover = (lines) => lines.map(plain).join("<br>") + "<extra></extra>";

  // ---- workloads: what the models have in common, and what a select offers
  const same = (a, b) =>
    a.engine === b.engine && a.batch === b.batch && a.input_len === b.input_len && a.output_len === b.output_len;
  const workloads = [];
  for (const model of data.models.filter((m) => m.teacher || !data.models.some((o) => o.teacher)))
    for (const s of model.speed) if (!workloads.some((w) => same(w, s))) workloads.push(s);
  const workloadName = (w) => `${w.engine}, batch ${w.batch}, ${w.input_len} + ${w.output_len} tokens`;
  const measured = (w) =>
    data.models.map((m) => ({ model: m, speed: m.speed.find((s) => same(s, w)) })).filter((p) => p.speed);
  const ratio = (name, w, rule) =>
    data.speedup.find((s) => s.model === name && s.rule === rule && s.engine === w.engine &&
      s.input_len === w.input_len && s.output_len === w.output_len &&
      (rule === "same_memory" || s.batch === w.batch));

  const range = (speed, key) => speed.ranges[key] || [speed[key], speed[key]];
  const whisker = (speed, key, colour) => {
    const [low, high] = range(speed, key);
    return { type: "data", symmetric: false, array: [high - speed[key]], arrayminus: [speed[key] - low],
      color: colour, thickness: 1.4, width: 5 };
  };

  function scatter(w) {
    const points = measured(w).filter((p) => p.model.loss != null && p.speed.output_tok_s != null);
    const teacher = points.find((p) => p.model.teacher);
    const traces = [], annotations = [];
    for (const { model, speed } of points) {
      const above = teacher && !model.teacher ? model.loss - teacher.model.loss : null;
      const faster = ratio(model.name, w, "same_batch");
      if (above != null)
        traces.push({ x: [teacher.speed.output_tok_s, speed.output_tok_s], y: [teacher.model.loss, model.loss],
          mode: "lines", line: { color: model.colour, width: 1.5, dash: "dot" }, hoverinfo: "skip" });
      const story = above == null ? "" : `${faster?.ratio != null ? times(faster.ratio) + ", " : ""}${signed(above)} nats`;
      traces.push({
        x: [speed.output_tok_s], y: [model.loss], mode: "markers",
        error_x: whisker(speed, "output_tok_s", model.colour),
        marker: { color: model.colour, symbol: model.symbol, size: 15, line: { color: "#fff", width: 1.5 } },
        hovertemplate: hover([model.label, ...(story ? [story] : []),
          `${number(speed.output_tok_s)} output tok/s`, `loss ${model.loss.toFixed(3)} nats`,
          `TTFT ${number(speed.ttft_ms)} ms, TPOT ${number(speed.tpot_ms)} ms`, ...model.facts]),
      });
      annotations.push({ x: speed.output_tok_s, y: model.loss, showarrow: false, yshift: model.teacher ? 24 : -28,
        align: "center", text: `<b>${short(model.label)}</b>${story ? "<br>" + plain(story) : ""}`,
        font: { color: model.colour, size: 13 },
        bgcolor: "rgba(255,255,255,0.8)", borderpad: 1 });
    }
    const xs = points.flatMap((p) => range(p.speed, "output_tok_s")), ys = points.map((p) => p.model.loss);
    const pad = (values, share, least) => {
      const low = Math.min(...values), high = Math.max(...values);
      const room = Math.max((high - low) * share, least);
      return [low - room, high + room];
    };
    const [xl, xh] = pad(xs, narrow() ? 0.42 : 0.22, Math.max(...xs) * 0.02);
    const [yl, yh] = pad(ys, 0.38, 0.03);
    annotations.push(
      { xref: "paper", yref: "paper", x: 1, y: 1.0, xanchor: "right", yanchor: "top", showarrow: false,
        text: "faster and better ↗", font: { color: SOFT, size: 12 } });
    draw("scatter", traces, {
      annotations, margin: { l: 64, r: 16, t: 8, b: 52 },
      xaxis: axis("output tokens a second →", { range: [Math.max(0, xl), xh], nticks: narrow() ? 4 : 8 }),
      yaxis: axis("loss in nats (up is better)", { range: [yh, yl], nticks: 6 }),
    });
    describe("scatter", "Scatter of speed against loss. " + points.map(({ model, speed }) =>
      `${model.label}: ${number(speed.output_tok_s)} output tokens a second at a loss of ${model.loss.toFixed(3)} nats`).join("; ") + ".");
  }

  // Rows from the bottom up, by position: two names may read the same once shortened.
  const rowAxis = (labels, extra) => axis("", { gridcolor: "rgba(0,0,0,0)", tickfont: { color: INK },
    tickvals: labels.map((_, row) => row), ticktext: labels.map((text) => text + "  "), ...extra });

  function bars(id, w, key, what) {
    const points = measured(w).filter((p) => p.speed[key] != null).reverse();
    const target = document.getElementById(id);
    if (target) target.style.height = `${44 + 46 * Math.max(1, points.length)}px`;
    const most = Math.max(0, ...points.map((p) => range(p.speed, key)[1]));
    draw(id, points.map(({ model, speed }, row) => ({
      type: "bar", orientation: "h", x: [speed[key]], y: [row], width: 0.62,
      marker: { color: model.colour }, error_x: whisker(speed, key, "#11151c"),
      hovertemplate: hover([model.label, `${number(speed[key])} tok/s`,
        `range ${range(speed, key).map((v) => number(v)).join(" to ")}`]),
    })), {
      margin: { l: 8, r: 8, t: 4, b: 30 }, barmode: "overlay",
      annotations: points.map(({ speed }, row) => ({ x: range(speed, key)[1], y: row, xanchor: "left",
        xshift: 7, showarrow: false, text: number(speed[key]), font: { size: 13, color: INK } })),
      xaxis: axis("", { range: [0, most * (narrow() ? 1.65 : 1.2)], nticks: 4, tickangle: 0 }),
      yaxis: rowAxis(points.map((p) => short(p.model.label))),
    });
    describe(id, `${what} in tokens a second. ` +
      points.map(({ model, speed }) => `${model.label}: ${number(speed[key])}`).reverse().join("; ") + ".");
  }

  function ratios(w) {
    const rows = [];
    for (const model of data.models.filter((m) => !m.teacher))
      for (const rule of ["same_batch", "same_memory"]) {
        const found = ratio(model.name, w, rule);
        if (found && found.ratio != null) rows.push({ model, found });
      }
    rows.reverse();
    const what = ({ model, found }) => `${short(model.label)}, ${found.rule_words}`;
    const batches = ({ found }) => `batch ${found.batch} against ${found.teacher_batch}`;
    const name = (row) => `${what(row)}<br><span style="color:${SOFT};font-size:12px">${batches(row)}</span>`;
    const above = narrow() ? rows.map((row, at) => ({ xref: "paper", x: 0, y: at, xanchor: "left", yshift: 19, xshift: 4,
      showarrow: false, text: `${what(row)}, <span style="color:${SOFT}">${batches(row)}</span>`, font: { size: 12, color: INK },
      bgcolor: "rgba(255,255,255,0.8)" })) : [];
    const highest = Math.max(1, ...rows.map((r) => r.found.interval[1])), lowest = Math.min(1, ...rows.map((r) => r.found.interval[0]));
    const target = document.getElementById("ratios");
    if (target) target.style.height = `${70 + 54 * Math.max(1, rows.length)}px`;
    draw("ratios", rows.map((row, at) => ({
      x: [row.found.ratio], y: [at], mode: "markers",
      error_x: { type: "data", symmetric: false, array: [row.found.interval[1] - row.found.ratio],
        arrayminus: [row.found.ratio - row.found.interval[0]], color: row.model.colour, thickness: 2.5, width: 7 },
      marker: { color: row.found.rule === "same_batch" ? row.model.colour : "#fff", symbol: row.model.symbol, size: 13,
        line: { color: row.model.colour, width: 2.5 } },
      hovertemplate: hover([row.model.label, `${times(row.found.ratio)} (${row.found.rule_words})`, row.found.interval_words]),
    })), {
      margin: { l: 8, r: 8, t: 8, b: 34 },
      annotations: [...above, { x: 1, yref: "paper", y: narrow() ? 0 : 1, xanchor: "left", yanchor: narrow() ? "bottom" : "top", xshift: 4, showarrow: false, text: "teacher",
        font: { size: 12, color: SOFT } }, ...rows.map((row, at) => ({ x: row.found.interval[1], y: at, xanchor: "left", xshift: 12,
        showarrow: false, text: `<b>${times(row.found.ratio)}</b>`, font: { size: 14, color: row.model.colour } }))],
      shapes: [{ type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: "#7b8593", width: 1.5, dash: "dash" } }],
      xaxis: axis("", { range: [Math.max(0, lowest - 0.12 * (highest - lowest) - 0.03), highest + (narrow() ? 0.4 : 0.24) * (highest - lowest) + 0.05],
        ticksuffix: "×", nticks: 6 }),
      yaxis: rowAxis(rows.map(name), { showticklabels: !narrow(), range: [-0.6, rows.length - (narrow() ? 0.2 : 0.4)] }),
    });
    describe("ratios", "Speed-up over the teacher. " + rows.map((r) =>
      `${r.model.label}, ${r.found.rule_words}, batch ${r.found.batch} against ${r.found.teacher_batch}: ${times(r.found.ratio)}`).reverse().join("; ") + ".");
  }

  function doubts(w) {
    const flags = new Set(measured(w).flatMap((p) => p.speed.flags));
    for (const place of document.querySelectorAll("[data-doubt]"))
      place.textContent = flags.size ? "Doubtful: " + [...flags].map((f) => data.flags[f] || f).join(", ") + "." : "";
  }

  const workloadSelect = document.getElementById("workload");
  function drawWorkload() {
    const w = workloads[Number(workloadSelect.value)];
    if (!w) return;
    scatter(w);
    bars("prefill", w, "prefill_tok_s", "Prefill speed");
    bars("decode", w, "decode_tok_s", "Decode speed");
    ratios(w);
    doubts(w);
  }
  if (workloadSelect) {
    workloads.forEach((w, i) => workloadSelect.add(new Option(workloadName(w), i)));
    const first = data.headline ? workloads.findIndex((w) => same(w, data.headline)) : 0;
    workloadSelect.value = String(Math.max(0, first));
    workloadSelect.addEventListener("change", drawWorkload);
  }

  // ---- training curves
  const curveSelect = document.getElementById("curve");
  const groups = [...new Set(data.curves.map((c) => c.group))];
  function drawCurves() {
    const group = groups[Number(curveSelect.value)];
    const shown = data.curves.filter((c) => c.group === group && c.points.length);
    const teacher = data.models.find((m) => m.teacher);
    const withTeacher = group === "distillation: validation loss" && teacher && teacher.loss != null;
    const label = (c) => byName.get(c.model)?.label ?? c.model;
    const traces = shown.map((c) => ({
      x: c.points.map((p) => p[0]), y: c.points.map((p) => p[1]), mode: c.points.length > 40 ? "lines" : "lines+markers",
      line: { color: c.colour, width: 2 }, marker: { size: 6 }, name: plain(label(c)),
      hovertemplate: plain(label(c)) + "<br>%{x:.3s} tokens<br>%{y:.3f} nats<extra></extra>",
    }));
    const annotations = shown.map((c) => {
      const last = c.points[c.points.length - 1];
      return { x: last[0], y: last[1], xanchor: "left", xshift: 8, showarrow: false, text: `<b>${short(label(c))}</b>`,
        font: { color: c.colour, size: 13 } };
    });
    if (withTeacher)
      annotations.push({ xref: "paper", x: 0, y: teacher.loss, xanchor: "left", yanchor: "bottom", showarrow: false,
        text: "teacher " + teacher.loss.toFixed(3), font: { color: teacher.colour, size: 12 } });
    spread(annotations.filter((a) => a.xshift), shown, withTeacher ? teacher.loss : null);
    const room = Math.min(140, 24 + 8 * Math.max(0, ...shown.map((c) => short(label(c)).length)));
    draw("curves", traces, {
      annotations, margin: { l: 60, r: room, t: 12, b: 52 }, hovermode: "closest",
      shapes: withTeacher ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: teacher.loss, y1: teacher.loss,
        line: { color: teacher.colour, width: 1.5, dash: "dash" } }] : [],
      xaxis: axis("tokens", { rangemode: "tozero", nticks: narrow() ? 4 : 8 }), yaxis: axis("nats a token", { nticks: 6 }),
    });
    const note = document.getElementById("curve-note");
    if (note) note.textContent = withTeacher ? "The dashed line is the teacher's loss on the same text." : "";
    describe("curves", `${group}, against tokens. ` + shown.map((c) =>
      `${label(c)}: from ${number(c.points[0][1])} to ${number(c.points[c.points.length - 1][1])} nats`).join("; ") + ".");
  }
  // Curves end close together: move their labels apart, in pixels, by rank.
  function spread(labels, shown, floor) {
    const values = shown.flatMap((c) => c.points.map((p) => p[1])).filter((v) => v != null);
    if (floor != null) values.push(floor);
    const perNat = 300 / Math.max(1e-9, Math.max(...values) - Math.min(...values));
    let last = -Infinity;
    for (const l of labels.sort((a, b) => a.y - b.y)) {
      const at = l.y * perNat, free = Math.max(at, last + 17);
      l.yshift = free - at;
      last = free;
    }
  }
  if (curveSelect) {
    groups.forEach((g, i) => curveSelect.add(new Option(g[0].toUpperCase() + g.slice(1), i)));
    const first = groups.indexOf("distillation: validation loss");
    curveSelect.value = String(Math.max(0, first));
    curveSelect.addEventListener("change", drawCurves);
  }

  function drawAll() {
    if (workloadSelect) drawWorkload();
    if (curveSelect && groups.length) drawCurves();
  }
  drawAll();

  // The labels' room depends on the width; a printed page shows the tables as well.
  let was = narrow();
  window.addEventListener("resize", () => { if (narrow() !== was) { was = narrow(); drawAll(); } });
  const opened = [];
  window.addEventListener("beforeprint", () => {
    for (const d of document.querySelectorAll("details:not([open])")) { d.open = true; opened.push(d); }
    for (const p of document.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(p);
  });
  window.addEventListener("afterprint", () => { while (opened.length) opened.pop().open = false; });
})();
