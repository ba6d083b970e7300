// ---- accuracy against throughput: who is on the frontier, who is dominated
function scatter(at, which) {
  const w = data.workloads[at], accuracy = data.accuracies[which];
  if (!accuracy) return;
  const found = data.frontier[at][which], beaten = new Set(found.dominated);
  const points = measured(w).filter((p) => accuracy.values[p.model.name] && p.speed.output_tok_s != null)
    .map((p) => ({ ...p, value: accuracy.values[p.model.name], beaten: beaten.has(p.model.name) }));
  const traces = [frontierLine(points)];
  for (const p of points) {
    const { model, speed, value } = p;
    const colour = p.beaten ? FAINT : model.colour;
    traces.push({
      x: [speed.output_tok_s], y: [value[0]], mode: "markers",
      error_x: whisker(speed, "output_tok_s", colour),
      error_y: { type: "data", symmetric: false, array: [value[2] - value[0]], arrayminus: [value[0] - value[1]],
        visible: value[2] > value[1], color: colour, thickness: 1.4, width: 5 },
      marker: { color: p.beaten ? "#fff" : model.colour, symbol: model.symbol, size: 15,
        line: { color: p.beaten ? colour : "#fff", width: p.beaten ? 2 : 1.5 } },
      hovertemplate: hover([model.label + (p.beaten ? " (dominated)" : ""), ...story(p, w, accuracy),
        `${number(speed.output_tok_s)} output tok/s`, `${accuracy.label} ${number(value[0], 4)} ${accuracy.unit}`,
        `TTFT ${number(speed.ttft_ms)} ms, TPOT ${number(speed.tpot_ms)} ms`, ...model.facts]),
    });
  }
  const xs = points.flatMap((p) => range(p.speed, "output_tok_s")), ys = points.flatMap((p) => p.value);
  const [xl, xh] = padded(xs, narrow() ? 0.42 : 0.22, Math.max(...xs) * 0.02);
  const [yl, yh] = padded(ys, 0.38, (Math.max(...ys.map(Math.abs)) || 1) * 0.01);
  const annotations = labels(points, w, accuracy, { xl, xh, yl, yh });
  annotations.push(
    { xref: "paper", yref: "paper", x: 1, y: 1.0, xanchor: "right", yanchor: "top", showarrow: false,
      text: "faster and better ↗", font: { color: SOFT, size: 12 } });
  const unit = accuracy.unit ? `, ${accuracy.unit}` : "";
  draw("scatter", traces, {
    annotations, margin: { l: 64, r: 16, t: 8, b: 52 },
    xaxis: axis("output tokens a second →", { range: [Math.max(0, xl), xh], nticks: narrow() ? 4 : 8 }),
    yaxis: axis(`${plain(accuracy.label)}${unit} (up is better)`, { range: accuracy.higher ? [yl, yh] : [yh, yl], nticks: 6 }),
  });
  element("frontier-words").textContent = found.words.join(" ");
  describe("scatter", `Scatter of speed against ${accuracy.label}. ` + points.map(({ model, speed, value }) =>
    `${model.label}: ${number(speed.output_tok_s)} output tokens a second, ${accuracy.label} ${number(value[0], 4)}`).join("; ")
    + ". " + found.words.join(" "));
}

function frontierLine(points) {
  const on = points.filter((p) => !p.beaten).sort((a, b) => a.speed.output_tok_s - b.speed.output_tok_s);
  return { x: on.map((p) => p.speed.output_tok_s), y: on.map((p) => p.value[0]), mode: "lines",
    line: { color: "#aeb6c2", width: 1.5, dash: "dot" }, hoverinfo: "skip" };
}

// What is said about a student beside its point: how much faster, how far from its teacher.
function story({ model, value }, w, accuracy) {
  const teacher = accuracy.values[model.of];
  if (model.teacher || !teacher) return [];
  const faster = ratio(model.name, w, "same_batch"), unit = accuracy.key === "loss" ? " nats" : "";
  const apart = signed(value[0] - teacher[0]) + unit;
  return [faster?.ratio != null ? `${times(faster.ratio)}, ${apart}` : apart];
}

const padded = (values, share, least) => {
  const low = Math.min(...values), high = Math.max(...values);
  const room = Math.max((high - low) * share, least);
  return [low - room, high + room];
};

// Labels above or below their points, wherever they hit no other one; what finds no place is hovered.
function labels(points, w, accuracy, { xl, xh, yl, yh }) {
  const box = element("scatter").getBoundingClientRect();
  const wide = box.width - 100, high = box.height - 70, placed = [];
  const pixel = (p) => [wide * (p.speed.output_tok_s - xl) / (xh - xl),
    high * (accuracy.higher ? yh - p.value[0] : p.value[0] - yl) / (yh - yl)];
  const marks = points.map(pixel);
  const free = ([x, y], half) => placed.every(([a, b, h]) => Math.abs(a - x) > half + h || Math.abs(b - y) > 34) &&
    marks.every(([a, b]) => Math.abs(a - x) > half || Math.abs(b - y) > 22);
  return points.flatMap((p) => {
    const lines = story(p, w, accuracy), [x, y] = pixel(p);
    const half = 4 * Math.max(cut(p.model.label, narrow() ? 16 : 26).length, ...lines.map((l) => l.length));
    const shift = (p.model.teacher || p.beaten ? [-28, 30, -62, 64] : [30, -28, 64, -62]).find((s) => free([x, y + s], half));
    if (shift == null) return [];
    placed.push([x, y + shift, half]);
    return [{ x: p.speed.output_tok_s, y: p.value[0], showarrow: false, yshift: -shift, align: "center",
      text: `<b>${short(p.model.label)}</b>${lines.map((l) => "<br>" + plain(l)).join("")}`,
      font: { color: p.beaten ? SOFT : p.model.colour, size: 13 }, bgcolor: "rgba(255,255,255,0.8)", borderpad: 1 }];
  });
}
