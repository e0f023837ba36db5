"use strict";
start((data) => {
  const metrics = Object.entries(data.metrics), models = data.rows.map((row) => row.model), MOST = 6;
  const withInterval = (metric) => (row) => (row[metric] === null ? "–" : element("span", {}, percent(row[metric]), element("span", { class: "small" }, half(row[`${metric}_low`], row[`${metric}_high`]))));

  // Table
  const size = (row) => { const n = Number(String(row.experts).split("–").at(-1)); return n <= 16 ? "up to 16" : n <= 64 ? "17 to 64" : "65 and more"; };
  const any = (values) => [["", "all"], ...[...new Set(values)].filter((v) => v !== null).sort().map((v) => [v, v])];
  fill("l-family", any(data.rows.map((row) => row.family)));
  fill("l-size", any(data.rows.filter((row) => Number(String(row.experts).split("–").at(-1)) > 0).map(size)));
  const rows = data.rows.map((row, i) => ({ ...row, place: row.rank ?? 1e6 + i }));
  const table = sortableTable(document.getElementById("l-table"), [
    { key: "place", label: "Rank", number: true, show: (row) => row.rank_text || "–" },
    { key: "model", label: "Model", show: (row) => element("span", {}, element("bdi", {}, row.model), row.baseline ? element("span", {}, " ", element("span", { class: "badge" }, "baseline")) : "", row.note ? element("div", { class: "small" }, row.note) : "") },
    ...metrics.map(([metric, label]) => ({ key: metric, label, number: true, show: withInterval(metric) })),
    { key: "random_router", label: "Random router", number: true, show: (row) => percent(row.random_router) },
    { key: "excess", label: "Excess", number: true, show: (row) => (row.excess === null ? "–" : element("div", {}, (row.excess > 0 ? "+" : "") + percent(row.excess), row.excess_low === null ? "" : element("div", { class: "small" }, `(${percent(row.excess_low)} to ${percent(row.excess_high)})`))) },
    { key: "share_of_word", label: "Word", title: "share of the specialization that the token alone gives", number: true, show: (row) => percent(row.share_of_word, 0) },
    { key: "domain_named", label: "Domain named", title: "of unseen texts, from their routing", number: true, show: (row) => percent(row.domain_named) },
    { key: "utilization", label: "Load used", number: true, show: (row) => percent(row.utilization) },
    ...(data.phases.model.length ? ["prompt", "generated"].map((phase) => ({ key: phase, label: phase === "prompt" ? "Prompt" : "Generated", title: `${data.metrics[data.metric]}, ${phase} only`, number: true, show: withInterval(phase) })) : []),
    ...(data.loss ? [{ key: "loss", label: "Bits per byte", title: "mean over domains; lower is better", number: true, show: (row) => fixed(row.loss, 3) }] : []),
    ...(data.accuracy ? [{ key: "accuracy", label: "Accuracy", number: true, show: (row) => percent(row.accuracy) }] : []),
    { key: "family", label: "Family" }, { key: "experts", label: "Experts", number: true }, { key: "k", label: "k", number: true }, { key: "layers", label: "Layers", number: true },
    { key: "tokens", label: "Tokens", number: true, show: (row) => (row.tokens === null ? "–" : row.tokens.toLocaleString("en")) }, { key: "phase", label: "Text" }, { key: "dtype", label: "dtype" }, { key: "date", label: "Date" }, { key: "versions", label: "Versions" },
  ], rows, { size: 50, pager: document.getElementById("l-pager"), sort: "place", down: false });
  const filter = () => {
    const text = chosen("l-text").trim().toLowerCase(), family = chosen("l-family"), experts = chosen("l-size"), baselines = document.getElementById("l-baselines").checked;
    table.set(rows.filter((row) => (!text || row.model.toLowerCase().includes(text)) && (!family || row.family === family) && (!experts || size(row) === experts) && (baselines || !row.baseline)));
  };
  ["l-family", "l-size", "l-baselines"].forEach((id) => onChange(id, filter));
  document.getElementById("l-text").addEventListener("input", filter);
  document.getElementById("l-csv").addEventListener("click", () => download("leaderboard.csv", csv(table.all().map(({ place, rank_text, ...row }) => row)), "text/csv;charset=utf-8"));

  // Overlay and profile
  fill("l-metric", metrics);
  const boxes = models.map((model, i) => { const box = element("input", { type: "checkbox", value: model }); box.checked = i < 4; return element("label", {}, box, element("bdi", {}, model)); });
  document.getElementById("l-models").replaceChildren(...boxes);
  const inputs = [...document.querySelectorAll("#l-models input")], wanted = () => inputs.filter((box) => box.checked).map((box) => box.value);
  inputs.forEach((box) => box.addEventListener("change", () => { if (wanted().length > MOST) box.checked = false; redraw("overlay", "parallel"); }));
  onChange("l-metric", () => redraw("overlay"));
  // Names stand at least a line apart: from the lowest to the highest each is pushed up where it would cover one it overlaps sideways.
  const spread = (rows, labelled, y, height, beside = () => true) => {
    const known = rows.flatMap((row) => [row[y], row.score_low, row.score_high]).filter((value) => value !== null && value !== undefined);
    const gap = (16 / height) * (y !== "score" ? Math.max(0.01, Math.max(...rows.map((row) => row[y])) - Math.min(...rows.map((row) => row[y]))) : Math.max(0.01, ...known) - Math.min(0, ...known)), placed = [];
    for (const row of rows.filter(labelled).sort((a, b) => a[y] - b[y])) {
      row.label_at = row[y];
      for (const other of placed) if (beside(row, other) && row.label_at < other.label_at + gap) row.label_at = other.label_at + gap;
      placed.push(row);
    }
    return rows;
  };
  addFigure("overlay", () => data.specs.overlay, () => spread(rowsOf(data.curves, (i) => data.curves.metric[i] === chosen("l-metric") && wanted().includes(data.curves.model[i])), (row) => row.depth === 1, "score", 300), () => rowsOf(data.curves));
  const last = () => metrics.filter(([metric]) => data.rows.some((row) => wanted().includes(row.model) && row[metric] !== null)).at(-1)?.[1];
  addFigure("parallel", () => data.specs.parallel, () => spread(data.rows.filter((row) => wanted().includes(row.model)).flatMap((row) => metrics.map(([metric, label]) => ({ model: row.model, metric: label, score: row[metric], score_low: row[`${metric}_low`], score_high: row[`${metric}_high`] }))).filter((row) => row.score !== null), (row) => row.metric === last(), "score", 300));
  const scatter = (field) => data.rows.filter((row) => (row[field] ?? null) !== null && row.specialization !== null).map((row) => ({ model: row.model, [field]: row[field], score: row.specialization, score_low: row.specialization_low, score_high: row.specialization_high }));
  const near = (field) => (a, b) => { const scores = scatter(field).map((row) => row.score); return Math.abs(a.score - b.score) < 0.25 * Math.max(0.01, Math.max(0, ...scores) - Math.min(0, ...scores)); };
  for (const [name, field, there] of [["scatter", "accuracy", data.accuracy], ["scatter-loss", "loss", data.loss]])
    if (there) addFigure(name, () => data.specs[name], () => spread(scatter(field), () => true, field, 280, near(field)), () => scatter(field));

  // Pairs
  const named = models.map((model) => [model, model]), signed = (value) => (value > 0 ? "+" : "") + percent(value, 2);
  fill("p-first", named, models[0]);
  fill("p-second", named, models[1] ?? models[0]);
  const pairs = () => {
    const first = chosen("p-first"), second = chosen("p-second"), found = rowsOf(data.pairs, (i) => data.pairs.first[i] === first && data.pairs.second[i] === second);
    if (found.length || first === second) return found;
    return rowsOf(data.pairs, (i) => data.pairs.first[i] === second && data.pairs.second[i] === first).map((row) => ({ ...row, first, second, score_first: row.score_second, score_second: row.score_first, difference: -row.difference, low: -row.high, high: -row.low }));
  };
  const pairTable = sortableTable(document.getElementById("p-table"), [
    { key: "metric", label: "Metric", show: (row) => data.metrics[row.metric] ?? row.metric }, { key: "depth", label: "Depth" }, { key: "score_first", label: "First", number: true, show: (row) => percent(row.score_first, 2) }, { key: "score_second", label: "Second", number: true, show: (row) => percent(row.score_second, 2) },
    { key: "difference", label: "Difference", number: true, show: (row) => signed(row.difference) }, { key: "low", label: "95 % interval", number: true, show: (row) => (row.low === null ? "–" : `${signed(row.low)} to ${signed(row.high)}`) }, { key: "adjusted", label: "p (Holm)", number: true, show: (row) => small(row.adjusted) },
    { key: "told", label: "Told apart", show: (row) => (row.adjusted !== null && row.adjusted <= 0.05 ? "yes" : "no") },
  ], pairs(), { pager: document.getElementById("p-pager") });
  ["p-first", "p-second"].forEach((id) => onChange(id, () => pairTable.set(pairs())));

  // Prompt and generated
  if (data.phases.model.length) {
    fill("g-metric", metrics.filter(([metric]) => data.phases.metric.includes(metric)), data.metric);
    const phases = () => rowsOf(data.phases, (i) => data.phases.metric[i] === chosen("g-metric"));
    const phaseTable = sortableTable(document.getElementById("g-table"), [
      { key: "model", label: "Model" }, { key: "prompt", label: "Prompt", number: true, show: withInterval("prompt") }, { key: "generated", label: "Generated", number: true, show: withInterval("generated") },
      { key: "difference", label: "Difference", number: true, show: (row) => signed(row.difference) }, { key: "low", label: "95 % interval", number: true, show: (row) => (row.low === null ? "–" : `${signed(row.low)} to ${signed(row.high)}`) }, { key: "p", label: "p", number: true, show: (row) => small(row.p) },
    ], phases(), { size: 50, pager: document.getElementById("g-pager"), sort: "difference" });
    onChange("g-metric", () => phaseTable.set(phases()));
    document.getElementById("g-csv").addEventListener("click", () => download("prompt-and-generated.csv", csv(rowsOf(data.phases)), "text/csv;charset=utf-8"));
  }

  // Published
  const names = [...new Set(data.published.flatMap(Object.keys))];
  sortableTable(document.getElementById("u-table"), names.map((name) => (name === "model" ? { key: name, label: "Model" } : { key: name, label: name, number: true, show: (row) => fixed(row[name], 4) })), data.published, { size: 500 });
});
