// ---- training curves
const groups = [...new Set(data.curves.map((c) => c.group))];
function drawCurves(group) {
  const shown = data.curves.filter((c) => c.group === group && c.points.length);
  const teachers = data.models.filter((m) => m.teacher && m.loss != null);
  const withTeacher = group === "distillation: validation loss" && teachers.length > 0;
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
  for (const teacher of withTeacher ? teachers : [])
    annotations.push({ xref: "paper", x: 0, y: teacher.loss, xanchor: "left", yanchor: "bottom", showarrow: false,
      text: `${teachers.length > 1 ? short(teacher.label) : "teacher"} ${teacher.loss.toFixed(3)}`, font: { color: teacher.colour, size: 12 } });
  spread(annotations.filter((a) => a.xshift), shown, withTeacher ? teachers[0].loss : null);
  const room = Math.min(190, 24 + 8 * Math.max(0, ...shown.map((c) => short(label(c)).length)));
  draw("curves", traces, {
    annotations, margin: { l: 60, r: room, t: 12, b: 52 }, hovermode: "closest",
    shapes: (withTeacher ? teachers : []).map((t) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: t.loss, y1: t.loss,
      line: { color: t.colour, width: 1.5, dash: "dash" } })),
    xaxis: axis("tokens", { rangemode: "tozero", nticks: narrow() ? 4 : 8 }), yaxis: axis("nats a token", { nticks: 6 }),
  });
  element("curve-note").textContent = withTeacher ? "The dashed line is the teacher's loss on the same text." : "";
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

function setUpCurves() {
  const select = element("curve");
  if (!select || !groups.length) return;
  fill(select, groups.map((g) => g[0].toUpperCase() + g.slice(1)), groups.indexOf("distillation: validation loss"));
  select.addEventListener("change", () => drawCurves(groups[Number(select.value)]));
  redraw.push(() => drawCurves(groups[Number(select.value)]));
}
