"use strict";
start((data) => {
  const between = (row, name) => (row[`${name}_low`] === null ? "" : `${percent(row[`${name}_low`], 2)} to ${percent(row[`${name}_high`], 2)}`);
  const told = (name) => (row) => (row[name] === null ? "–" : element("div", {}, percent(row[name], 2), element("div", { class: "small" }, between(row, name))));
  const share = (key, label, title) => ({ key, label, title, number: true, show: told(key) });
  const count = (key, label) => ({ key, label, number: true, show: (row) => row[key].toLocaleString("en") });
  const name = (key, label) => ({ key, label, show: (row) => element("bdi", {}, row[key]) });
  const signed = (value) => (value > 0 ? "+" : "") + percent(value, 2);

  if (document.getElementById("a-layers")) {
    fill("a-share", Object.entries(data.shares));
    const shown = () => data.layers.map((row) => ({ ...row, value: row[chosen("a-share")], low: row[`${chosen("a-share")}_low`], high: row[`${chosen("a-share")}_high`] }));
    addFigure("layers", () => data.specs.layers, shown, () => data.layers);
    onChange("a-share", () => redraw("layers"));
    dataTable("a-layers", [
      { key: "layer", label: "Layer", number: true }, count("compared", "Tokens"), share("differing", "Sets differ"), share("kept", "Slots kept"),
      share("started", "Starts here", "of tokens with equal sets at all earlier layers"), share("reached", "Differed so far", "of all tokens"), count("missing", "Left out"),
    ], data.layers, { size: 100, sort: "layer", down: false, file: "layers" });
    addFigure("domains", () => ({ ...data.specs.domains, height: 30 * data.domains.length + 12 }), () => data.domains);
    addFigure("cells", () => ({ ...data.specs.cells, height: 24 * data.domains.length + 12 }), () => data.cells);
    dataTable("a-domains", [name("domain", "Domain"), count("documents", "Documents"), count("tokens", "Tokens"), share("differing", "Sets differ"), share("kept", "Slots kept")], data.domains, { size: 100, sort: "differing", file: "domains" });
  }
  if (document.getElementById("a-margins")) {
    addFigure("margins", () => data.specs.margins, () => data.margins);
    dataTable("a-margins", [
      { key: "label", label: "Margin, quantile" }, { key: "upper", label: "up to", number: true, show: (row) => number(row.upper) }, count("pairs", "Pairs"),
      share("differing", "Sets differ"), share("part", "Of all differences"),
    ], data.margins, { size: 20, file: "margins" });
  }
  if (document.getElementById("a-scores")) {
    dataTable("a-scores", [
      { key: "metric", label: "Metric" }, { key: "depth", label: "Depth" }, { key: "score_first", label: "First", number: true, show: (row) => percent(row.score_first, 2) },
      { key: "score_second", label: "Second", number: true, show: (row) => percent(row.score_second, 2) },
      { key: "difference", label: "Difference", number: true, show: (row) => element("div", {}, signed(row.difference), row.low === null ? "" : element("div", { class: "small" }, `${percent(row.low, 2)} to ${percent(row.high, 2)}`)) },
      { key: "adjusted", label: "p (Holm)", number: true, show: (row) => small(row.adjusted) },
    ], data.scores, { size: 100, file: "scores" });
  }
});
