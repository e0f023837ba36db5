"use strict";
start((data) => {
  const { layers, domains, specs, has } = data;
  const named = layers.map((layer) => [layer, layer]), each = domains.map((domain) => [domain, domain]);
  const log2 = (value) => (value === null || value === undefined ? null : Math.log2(Math.max(value, 1 / 64)));

  // Layer by layer
  const ALL = "\u0000all";
  fill("curve-domain", [[ALL, "all domains"], ...each], ALL);
  const scale = () => document.querySelector("input[name=scale]:checked").value;
  const full = () => document.getElementById("full").checked;
  const wanted = () => (chosen("curve-domain") === ALL ? null : chosen("curve-domain"));
  const curves = Object.keys(data.metrics);
  const told = (value) => value !== null && value !== undefined;
  const some = (name) => (rows) => rows.some((row) => told(row[typeof name === "function" ? name() : name]));
  for (const metric of curves) {
    addFigure(`curve-${metric}`, () => specs.curve[scale() + (full() ? "_full" : "")],
      () => rowsOf(data.curves, (i) => data.curves.metric[i] === metric && data.curves.domain[i] === (data.whole.includes(metric) ? null : wanted())),
      () => rowsOf(data.curves, (i) => data.curves.metric[i] === metric).map((row) => ({ ...row, domain: row.domain ?? "" })), some(scale));
  }
  if (!data.curves.score.some(told)) document.querySelector("input[name=scale][value=value]").checked = true; // no score without documents
  const parts = (keep) => rowsOf(data.parts, (i) => keep(data.parts.domain[i]));
  addFigure("parts", () => specs.parts, () => parts((domain) => domain === wanted()), () => parts(() => true).map((row) => ({ ...row, domain: row.domain ?? "" })));
  const key = () => {
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent"), other = getComputedStyle(document.documentElement).getPropertyValue("--second"), soft = getComputedStyle(document.documentElement).getPropertyValue("--soft");
    const swatch = (d, stroke, dash, extra = "") => { const span = element("span"); const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"); for (const [k, v] of Object.entries({ width: 30, height: 14, "aria-hidden": "true" })) svg.setAttribute(k, v);
      const add = (tag, attributes) => { const part = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [k, v] of Object.entries(attributes)) part.setAttribute(k, v); svg.append(part); };
      if (extra === "band") add("rect", { x: 0, y: 2, width: 30, height: 10, fill: stroke, opacity: 0.22 });
      if (extra === "open") add("circle", { cx: 15, cy: 7, r: 3.5, fill: "none", stroke, "stroke-width": 1.5 }); else add("path", { d, stroke, fill: "none", "stroke-width": 2, "stroke-dasharray": dash });
      span.append(svg); return span; };
    const line = "M0 7H30", score = scale() === "score";
    document.getElementById("curve-key").replaceChildren(
      element("li", {}, swatch(line, accent, "", "band"), score ? "score, 95 % interval" : "value, 95 % interval of the corrected value"), element("li", {}, swatch(line, accent, "", "open"), data.untold || "not above chance (p > 0.05)"),
      element("li", {}, swatch(line, other, "5 4"), score ? "random router" : "chance (shuffled labels)"), ...(score ? [element("li", {}, swatch(line, soft, ""), "0: chance")] : []), ...(full() ? [element("li", {}, swatch(line, soft, "1 3"), score ? "1: ideal router" : "ideal router")] : []));
  };
  const all = () => { key(); redraw("parts", ...curves.map((metric) => `curve-${metric}`)); };
  key();
  document.addEventListener("theme", key);
  document.querySelectorAll("input[name=scale], #full, #curve-domain").forEach((input) => input.addEventListener("change", all));

  // Domain by domain
  fill("domain-metric", [...new Set(data.curve_domains.metric)].map((metric) => [metric, data.metrics[metric] ?? metric]));
  addFigure("domain", () => specs.domain, () => rowsOf(data.curve_domains, (i) => data.curve_domains.metric[i] === chosen("domain-metric")).map((row) => ({ ...row, label: row.score === null ? "" : percent(row.score) })), () => rowsOf(data.curve_domains), some("score"));
  onChange("domain-metric", () => redraw("domain"));
  if (data.ablation.length) addFigure("ablation", () => ({ ...specs.ablation, height: 58 * new Set(data.ablation.map((row) => row.label)).size + 12 }), () => data.ablation);
  fill("similarity-layer", [["mean", "mean of all"], ...named], "mean");
  const similarity = (index) => data.order.flatMap((first) => data.order.map((second) => ({ layer: index < layers.length ? layers[index] : "mean", first, second, similarity: data.similarity[index][domains.indexOf(first)][domains.indexOf(second)] })));
  addFigure("similarity", () => specs.similarity, () => {
    const rows = similarity(chosen("similarity-layer") === "mean" ? layers.length : layers.indexOf(Number(chosen("similarity-layer"))));
    const known = rows.map((row) => row.similarity).filter((value) => value !== null), low = Math.min(...known), middle = low + 0.55 * (Math.max(...known) - low);
    return rows.map((row) => ({ ...row, label: row.similarity === null ? "" : row.similarity.toFixed(2).replace(/^(-?)0/, "$1"), strong: dark() ? row.similarity < middle : row.similarity > middle }));
  }, () => data.similarity.flatMap((_, index) => similarity(index)), some("similarity"));
  onChange("similarity-layer", () => redraw("similarity"));
  if (has.tree) addFigure("dendrogram", () => specs.dendrogram, () => data.dendrogram);

  const strata = data.strata;
  if (Object.keys(strata).length) {
    fill("strata-kind", Object.entries(strata).map(([kind, found]) => [kind, found.title]));
    addFigure("strata", () => specs.strata, () => strata[chosen("strata-kind")].rows, () => Object.entries(strata).flatMap(([kind, found]) => found.rows.map(({ domain, control, label, ...row }) => ({ kind, stratum: domain, ...row }))));
    onChange("strata-kind", () => redraw("strata"));
  }

  // Domains x experts
  const heat = data.heat, starts = [];
  let cells = 0;
  if (heat) {
    for (const _ of domains) { starts.push([]); for (const [i, experts] of data.experts.entries()) { starts.at(-1).push(cells); cells += experts; } }
    // Share of a layer's choices in a domain, and lift: that share over its mean over the domains; null where it is not defined.
    const usage = (column) => {
      const experts = data.experts[column];
      const share = starts.map((at) => { const hits = heat.hits.slice(at[column], at[column] + experts), total = hits.reduce((a, b) => a + b, 0); return hits.map((count) => (total ? count / total : null)); });
      const mean = Array.from({ length: experts }, (_, expert) => share.reduce((sum, each) => (sum === null || each[expert] === null ? null : sum + each[expert]), 0)).map((sum) => (sum ? sum / domains.length : null));
      return { share, mean, lift: share.map((each) => each.map((value, expert) => (value === null || mean[expert] === null ? null : value / mean[expert]))) };
    };
    page.heatRows = (layer) => {
      const column = layers.indexOf(layer), experts = data.experts[column], rows = [], { share, lift } = usage(column);
      const best = Array.from({ length: experts }, (_, expert) => domains.reduce((top, _, domain) => ((lift[domain][expert] ?? 0) > (lift[top][expert] ?? 0) ? domain : top), 0));
      const rank = best.map((domain, expert) => [data.order.indexOf(domains[domain]), -(lift[domain][expert] ?? 0), expert]).sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
      const order = new Map(rank.map(([, , expert], place) => [expert, place]));
      for (const name of data.order) {
        const domain = domains.indexOf(name), start = starts[domain][column];
        for (let expert = 0; expert < experts; expert++) {
          const i = start + expert, value = heat.lift[i], reach = heat.reach[i], end = (number) => (value === null || reach === null ? null : Math.max(0, Number(number.toFixed(4))));
          rows.push({ layer, domain: name, expert, hits: heat.hits[i], share: share[domain][expert], lift: value === null ? null : Number(value.toPrecision(6)), lift_low: end(value - reach), lift_high: end(value + reach), q: heat.q[i], kind: ["not above", "too rare to tell", "specialist"][heat.kind[i]], shade: log2(value), order: order.get(expert) });
        }
      }
      return rows;
    };
    if (has.lift) fill("heat-layer", named, layers[Math.floor(layers.length / 2)]);
    addFigure("heat", () => specs.heat, () => page.heatRows(Number(chosen("heat-layer"))), () => layers.flatMap((layer) => page.heatRows(layer)).map(({ shade, order, ...row }) => row), some("lift"));
    onChange("heat-layer", () => redraw("heat"));
    const load = () => layers.flatMap((layer, column) => {
      const experts = data.experts[column], { share } = usage(column);
      const shares = Array.from({ length: experts }, (_, expert) => share.reduce((sum, each) => sum + (each[expert] ?? 0), 0) / domains.length);
      return shares.map((share, expert) => [share, expert]).sort((a, b) => b[0] - a[0]).map(([share, expert], rank) => ({ layer, rank: experts - rank, expert, load: share, relative: share * experts, shade: log2(share * experts) }));
    });
    addFigure("load", () => specs.load, load, () => load().map(({ shade, rank, ...row }) => row));
  }
  addFigure("utilization", () => specs.utilization, () => data.load);

  // Specialists
  const s = data.specialists, rows = rowsOf(s);
  fill("s-domain", [["", "all"], ...each]);
  fill("s-layer", [["", "all"], ...named]);
  const tokens = (row) => {
    const chips = row.tokens.map((token) => element("span", { class: "token", dir: "auto" }, token.replaceAll(" ", "·")));
    if (!row.contexts.length) return element("div", {}, ...chips);
    return element("div", {}, ...chips, element("details", {}, element("summary", {}, "in context"), ...row.contexts.map(([before, token, after]) => element("p", { class: "context token", dir: "auto" }, "…" + before, element("mark", {}, token), after + "…"))));
  };
  const table = has.tests && sortableTable(document.getElementById("s-table"), [
    { key: "domain", label: "Domain" }, { key: "layer", label: "Layer", number: true }, { key: "expert", label: "Expert", number: true },
    { key: "lift", label: "Lift", number: true, show: (row) => fixed(row.lift) }, { key: "q", label: "q-value", number: true, show: (row) => small(row.q) },
    { key: "tokens", label: "Typical tokens", show: tokens },
    { key: "lift_low", label: "95 % interval", number: true, show: (row) => `${fixed(row.lift_low)} – ${fixed(row.lift_high)}` },
    { key: "share", label: "Share", number: true, show: (row) => percent(row.share) }, { key: "hits", label: "Hits", number: true, show: (row) => row.hits.toLocaleString("en") },
  ], rows, { size: 12, pager: document.getElementById("s-pager"), sort: "lift" });
  const filter = () => {
    const text = chosen("s-text").trim().toLowerCase(), domain = chosen("s-domain"), layer = chosen("s-layer"), q = Number(chosen("s-q"));
    table.set(rows.filter((row) => (!domain || row.domain === domain) && (layer === "" || row.layer === Number(layer)) && row.q <= q && (!text || String(row.expert) === text || row.tokens.some((token) => token.toLowerCase().includes(text)))));
  };
  ["s-domain", "s-layer", "s-q"].forEach((id) => onChange(id, filter));
  document.getElementById("s-text")?.addEventListener("input", filter);
  document.getElementById("s-csv")?.addEventListener("click", () => download(`${data.name}-specialists.csv`, csv(table.all()), "text/csv;charset=utf-8"));

  // Trajectories: every move is a ribbon of four points between the places of its experts
  if (has.moves) {
    const SPAN = 8, pairs = layers.length - 1;
    fill("move-domain", each);
    fill("move-layer", layers.slice(0, Math.max(1, layers.length - SPAN + 1)).map((layer) => [layer, layer]));
    const moves = () => {
      const domain = domains.indexOf(chosen("move-domain")), count = Number(chosen("move-count")), first = layers.indexOf(Number(chosen("move-layer"))), last = Math.min(first + SPAN - 1, pairs);
      const found = [], weight = new Map(), at = (column, expert) => `${column} ${expert}`;
      for (let column = first; column < last; column++) for (const [from, to, share, lift] of data.moves[domain][column].slice(0, count)) {
        found.push({ column, from, to, share, lift });
        for (const [c, e] of [[column, from], [column + 1, to]]) { const k = at(c, e); const known = weight.get(k) ?? { column: c, expert: e, in: 0, out: 0 }; c === column ? (known.out += share) : (known.in += share); weight.set(k, known); }
      }
      const places = new Map(), rows = [];
      for (let column = first; column <= last; column++) {
        const here = [...weight.values()].filter((node) => node.column === column).map((node) => ({ ...node, share: Math.max(node.in, node.out) })).sort((a, b) => b.share - a.share || a.expert - b.expert);
        here.forEach((node, place) => { places.set(at(column, node.expert), place); rows.push({ kind: "expert", layer: layers[column], expert: String(node.expert), share: node.share, place }); });
      }
      for (const move of found) {
        const x = layers[move.column], step = layers[move.column + 1] - x, from = places.get(at(move.column, move.from)), to = places.get(at(move.column + 1, move.to));
        const label = `layer ${x} expert ${move.from} → layer ${layers[move.column + 1]} expert ${move.to}`;
        for (const [part, place] of [[0, from], [0.3, from], [0.7, to], [1, to]]) rows.push({ kind: "move", move: label, layer: x + part * step, place, share: move.share, lift: move.lift, shade: log2(move.lift) });
      }
      return rows;
    };
    addFigure("trajectory", () => specs.trajectory, moves, () => data.moves.flatMap((byLayer, domain) => byLayer.flatMap((list, column) => list.map(([from, to, share, lift]) => ({ domain: domains[domain], layer: layers[column], expert: from, next_layer: layers[column + 1], next_expert: to, share, lift })))));
    ["move-domain", "move-count", "move-layer"].forEach((id) => onChange(id, () => redraw("trajectory")));
  }

  // Text
  if (has.text) {
    const slots = Math.max(...data.top_k), place = document.getElementById("t-tokens"), inspector = document.getElementById("t-inspector");
    fill("t-document", data.text.map((document, i) => [i, `${document.domain}: ${document.id}${document.whole ? "" : " (beginning)"}`]));
    fill("t-layer", named, layers[Math.floor(layers.length / 2)]);
    let now = -1;
    const used = (text, token, column) => {
      const start = (token * layers.length + column) * slots, found = [];
      for (let slot = 0; slot < slots; slot++) if (text.experts[start + slot] >= 0) found.push([text.experts[start + slot], text.weights.length ? text.weights[start + slot] : null]);
      return found;
    };
    const show = () => {
      const text = data.text[Number(chosen("t-document"))], column = layers.indexOf(Number(chosen("t-layer"))), wanted = chosen("t-expert") ?? "";
      const lists = text.tokens.map((_, token) => used(text, token, column)), counts = new Map();
      if (text.weights.length || slots === 1) lists.forEach((list) => list.length && counts.set(list[0][0], (counts.get(list[0][0]) ?? 0) + 1));
      const common = [...counts.entries()].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 7), palette = CATEGORY[dark() ? "dark" : "light"];
      const colour = new Map(common.map(([expert], i) => [expert, palette[i]]));
      const present = [...new Set(lists.flat().map(([expert]) => expert))].sort((a, b) => a - b);
      fill("t-expert", [["", "none"], ...present.map((expert) => [expert, expert])], present.includes(Number(wanted)) && wanted !== "" ? wanted : "");
      const marked = chosen("t-expert");
      place.replaceChildren(...text.tokens.flatMap((token, i) => {
        const list = lists[i], uses = marked !== "" && list.some(([expert]) => String(expert) === marked);
        const span = element("span", { class: "t" + (token === "" ? " part" : "") + (marked === "" ? "" : uses ? " uses" : " faint"), "data-token": i, dir: "auto" }, token);
        if (list.length && counts.size) { span.append(element("sub", {}, list[0][0])); span.style.borderBottomColor = colour.get(list[0][0]) ?? "var(--line)"; }
        return token.endsWith("⏎") ? [span, element("br")] : [span];
      }));
      document.getElementById("t-key").replaceChildren(...common.map(([expert, count]) => { const bar = element("i"); bar.style.background = colour.get(expert); return element("li", {}, bar, `expert ${expert}: primary of ${count} tokens`); }));
      inspect(Math.min(now, text.tokens.length - 1));
    };
    const inspect = (token) => {
      now = token;
      place.querySelectorAll(".now").forEach((old) => old.classList.remove("now"));
      const text = data.text[Number(chosen("t-document"))], column = layers.indexOf(Number(chosen("t-layer")));
      if (token < 0) return inspector.replaceChildren(element("span", { class: "small" }, "Choose a token to see its experts and their weights."));
      place.querySelector(`[data-token="${token}"]`)?.classList.add("now");
      inspector.replaceChildren(element("div", {}, "Token ", element("span", { class: "token", dir: "auto" }, text.tokens[token] || text.bytes[token]), text.tokens[token] && text.bytes[token] ? `, of which it is ${text.bytes[token]},` : "", ` at layer ${layers[column]}, position ${token}:`),
        element("ul", { class: "weights" }, ...used(text, token, column).map(([expert, weight]) => { const bar = element("i"); bar.style.width = `${Math.max(2, (weight ?? 0) * 0.9)}px`; return element("li", {}, ...(weight === null ? [] : [bar]), `expert ${expert}` + (weight === null ? "" : ` · ${weight} %`)); })));
    };
    for (const type of ["mouseover", "click"]) place.addEventListener(type, (event) => { const token = event.target.closest("[data-token]"); if (token) inspect(Number(token.dataset.token)); });
    place.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      inspect(Math.max(0, Math.min(data.text[Number(chosen("t-document"))].tokens.length - 1, now + by)));
      place.querySelector(".now")?.scrollIntoView({ block: "nearest" });
    });
    addFigure("text", null, () => [], () => { const text = data.text[Number(chosen("t-document"))]; return text.tokens.flatMap((token, i) => layers.flatMap((layer, column) => used(text, i, column).map(([expert, weight]) => ({ document: text.id, domain: text.domain, position: i, token: token || text.bytes[i], layer, expert, weight_percent: weight })))); });
    ["t-document", "t-layer", "t-expert"].forEach((id) => onChange(id, show));
    document.addEventListener("theme", show);
    show();
  }
});
