"use strict";
start((data) => {
  const bits = (value, digits = 4) => fixed(value, digits).replace(/^-(0\.0*)$/, "$1");
  const known = (value) => value !== null && value !== undefined;
  const between = (row, name, digits) => (known(row[`${name}_low`]) ? `${bits(row[`${name}_low`], digits)} to ${bits(row[`${name}_high`], digits)}` : "");
  const told = (name, digits = 4) => (row) => (known(row[name]) ? element("div", {}, bits(row[name], digits), element("div", { class: "small" }, between(row, name, digits))) : "–");
  const words = (row, name, digits) => (known(row[name]) ? bits(row[name], digits) + (known(row[`${name}_low`]) ? ` (${between(row, name, digits)})` : "") : "–");
  const count = (value) => (known(value) ? Number(value).toLocaleString("en", { maximumFractionDigits: 1 }) : "–");
  const bytes = (value) => (known(value) ? (value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : value >= 1e5 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e3).toFixed(2)} kB`) : "–");
  const column = (key, label, show, title) => ({ key, label, number: true, show, title });
  const name = (key, label) => ({ key, label, show: (row) => element("bdi", {}, row[key]) });

  // Names stand beside their points where they cover neither a name nor a point; a name without room is in the table only.
  const HEIGHT = 430;
  function place(rows, view, width) {
    const at = (row) => [((row.x - view.x0) / (view.x1 - view.x0)) * width, HEIGHT * (1 - (row.y - view.y0) / (view.y1 - view.y0))];
    const taken = rows.map(at).map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
    const free = (box) => box[0] > 2 && box[2] < width - 2 && box[1] > 2 && box[3] < HEIGHT - 2 && taken.every((other) => box[2] < other[0] || other[2] < box[0] || box[3] < other[1] || other[3] < box[1]);
    for (const row of [...rows].sort((a, b) => a.x - b.x)) {
      const [x, y] = at(row), half = row.label.length * 3.1 + 4;
      search: for (let reach = 15; reach < 190; reach += 13) {
        for (let turn = 0; turn < 16; turn++) {
          // right of the point first, left last, never level with it: there its interval runs
          const angle = ((turn % 2 ? -1 : 1) * (Math.floor(turn / 2) + 1) * Math.PI) / 8.5;
          const cx = x + Math.cos(angle) * reach + Math.cos(angle) * half, cy = y - Math.sin(angle) * reach;
          const box = [cx - half, cy - 7, cx + half, cy + 7];
          if (!free(box)) continue;
          taken.push(box);
          // The line ends at the name's nearest edge, not in its middle.
          row.name_x = view.x0 + (cx / width) * (view.x1 - view.x0);
          row.name_y = view.y0 + (1 - cy / HEIGHT) * (view.y1 - view.y0);
          const ex = Math.max(box[0], Math.min(x, box[2])), ey = Math.max(box[1], Math.min(y, box[3]));
          row.edge_x = view.x0 + (ex / width) * (view.x1 - view.x0);
          row.edge_y = view.y0 + (1 - ey / HEIGHT) * (view.y1 - view.y0);
          break search;
        }
      }
    }
  }

  data.targets.forEach((target, i) => {
    const points = target.arms.filter((arm) => known(arm.gain) && known(arm.forgetting));
    const chosenView = () => document.querySelector(`input[name="view-${i}"]:checked`)?.value ?? "all";
    const bars = () => document.getElementById(`bars-${i}`)?.checked ?? true;
    // Forgetting little: up to 1.2 times the most forgetful expert path.
    const reach = 1.2 * Math.max(0, ...points.filter((arm) => arm.group === "expert path" || arm.group === "target load").map((arm) => arm.forgetting));
    const near = points.filter((arm) => arm.forgetting <= reach);
    const inView = () => (chosenView() === "near" ? near : points);
    const frame = () => {
      const shown = inView(), end = (field, side) => shown.map((arm) => (bars() && known(arm[`${field}_${side}`]) ? arm[`${field}_${side}`] : arm[field]));
      const edges = (field) => {
        const low = Math.min(0, ...end(field, "low")), high = Math.max(0, ...end(field, "high")), room = 0.06 * (high - low || 1);
        return [low - room, high + room];
      };
      const [x0, x1] = edges("forgetting"), [y0, y1] = edges("gain");
      return { x0, x1, y0, y1 };
    };
    const rows = () => {
      const view = frame(), plot = document.querySelector(`[data-figure="plane-${i}"] [data-plot]`), width = Math.max(200, plot.clientWidth - 62);
      const arms = inView().map((arm) => ({
        mark: "arm", arm: arm.arm, label: arm.label, group: arm.group, x: arm.forgetting, y: arm.gain,
        ...(bars() ? { x_low: arm.forgetting_low ?? arm.forgetting, x_high: arm.forgetting_high ?? arm.forgetting, y_low: arm.gain_low ?? arm.gain, y_high: arm.gain_high ?? arm.gain } : { x_low: arm.forgetting, x_high: arm.forgetting, y_low: arm.gain, y_high: arm.gain }),
        gain: words(arm, "gain"), forgetting: words(arm, "forgetting"), ratio: words(arm, "matched_ratio", 2),
      }));
      place(arms, view, width);
      const front = target.front.map((arm) => points.find((one) => one.arm === arm)).filter(Boolean).map((arm, order) => ({ mark: "front", order, x: arm.forgetting, y: arm.gain }));
      return [...arms, ...front, ...target.trajectories.map((point) => ({ mark: "trajectory", arm: point.arm, step: point.step, x: point.forgetting, y: point.gain }))];
    };
    const spec = () => {
      const view = frame(), left = points.filter((arm) => !inView().includes(arm)).map((arm) => arm.arm);
      const status = document.getElementById(`outside-${i}`);
      if (status) status.textContent = left.length ? `Outside of the view: ${left.join(", ")}.` : "";
      return { ...data.specs.plane, params: Object.entries(view).map(([key, value]) => ({ name: key, value })) };
    };
    if (near.length && near.length < points.length) {
      // Far-off full finetuning would press everything else against the axis.
      const most = Math.max(...points.map((arm) => arm.forgetting));
      if (reach > 0 && most > 4 * reach) document.querySelector(`input[name="view-${i}"][value="near"]`).checked = true;
    }
    addFigure(`plane-${i}`, spec, rows, () => [
      ...target.arms.map((arm) => ({ target: target.target, arm: arm.arm, step: "last", group: arm.group, pareto: arm.pareto, forgetting: arm.forgetting, forgetting_low: arm.forgetting_low, forgetting_high: arm.forgetting_high, gain: arm.gain, gain_low: arm.gain_low, gain_high: arm.gain_high })),
      ...target.trajectories.map((point) => ({ target: target.target, arm: point.arm, step: point.step, group: "trajectory", pareto: null, forgetting: point.forgetting, forgetting_low: null, forgetting_high: null, gain: point.gain, gain_low: null, gain_high: null })),
    ]);
    document.querySelectorAll(`input[name="view-${i}"], #bars-${i}`).forEach((input) => input.addEventListener("change", () => redraw(`plane-${i}`)));

    if (document.getElementById(`arms-${i}`)) {
      dataTable(`arms-${i}`, [
        { key: "arm", label: "Arm", show: (row) => element("span", {}, element("bdi", {}, row.arm), row.pareto ? element("span", {}, " ", element("span", { class: "badge" }, "Pareto")) : "", element("div", { class: "small" }, row.group)) },
        column("gain", "Gain", told("gain")), column("forgetting", "Forgetting", told("forgetting")), column("worst_forgetting", "Worst domain", told("worst_forgetting"), "forgetting of the domain that lost most"),
        column("matched_ratio", "Times full", (row) => (known(row.matched_ratio) ? told("matched_ratio", 2)(row) : known(row.matched_gain) ? "not defined" : "–"), "gain at matched forgetting over that of full finetuning stopped early"),
        column("matched_gain", "Matched gain", told("matched_gain"), "gain at matched forgetting"), column("matched_full", "of full", told("matched_full"), "full finetuning's gain at the same forgetting"),
        column("matched_difference", "Difference", told("matched_difference"), "matched gain minus that of full"), column("matched_forgetting", "at forgetting", (row) => bits(row.matched_forgetting)),
        column("equal_compute_gain", "Full, same seconds", (row) => (known(row.equal_compute_gain) ? element("div", {}, bits(row.equal_compute_gain), element("div", { class: "small" }, `forgets ${bits(row.equal_compute_forgetting)}`)) : "–"), "gain of full finetuning after as many seconds"),
        ...(target.has_items ? [
          column("accuracy_gain", "Accuracy", told("accuracy_gain", 3), "change of the share of the target's items whose right choice is the likeliest"), column("accuracy_elsewhere", "Accuracy elsewhere", told("accuracy_elsewhere", 3), "the same for the other domains with items, their mean"),
          column("accuracy_gain_per_byte", "Accuracy per byte", told("accuracy_gain_per_byte", 3), "by likelihood per byte of the choice"), column("accuracy_elsewhere_per_byte", "elsewhere, per byte", told("accuracy_elsewhere_per_byte", 3), "the same for the other domains with items, their mean"),
        ] : []),
        column("cells", "Cells", (row) => count(row.cells)), column("coverage", "Coverage", (row) => percent(row.coverage), "share of the target's routing load"),
        column("trainable_parameters", "Trainable", (row) => count(row.trainable_parameters)), column("optimizer_bytes", "Optimizer", (row) => bytes(row.optimizer_bytes)), column("training_seconds", "Seconds", (row) => count(row.training_seconds)),
        column("peak_added_bytes", "Peak memory", (row) => bytes(row.peak_added_bytes), "added while training"), column("rate", "Rate", (row) => number(row.rate), "learning rate"), column("steps_without_gradient", "Idle steps", (row) => count(row.steps_without_gradient), "steps in which no chosen cell got a gradient"),
      ], target.arms, { size: 60, sort: "gain", file: `arms-${i}` });
    }
    if (document.getElementById(`contrasts-table-${i}`)) {
      const drawn = () => target.contrasts.filter((row) => !row.note).map((row) => ({ label: row.label, series: row.series, value: row.matched, low: row.matched_low, high: row.matched_high }));
      const lines = new Set(drawn().map((row) => row.label)).size;
      addFigure(`contrasts-${i}`, () => ({ ...data.specs.contrasts, height: 34 * lines + 12 }), drawn, () => target.contrasts);
      dataTable(`contrasts-table-${i}`, [
        { key: "arm", label: "Arm", show: (row) => element("span", {}, element("bdi", {}, row.arm), row.better ? element("span", {}, " ", element("span", { class: "badge" }, "better")) : "") },
        name("control", "Against"), column("overlap", "Common cells", (row) => percent(row.overlap, 0), "cells of both over cells of either, mean over seeds"), column("matched", "Matched difference", (row) => row.note || told("matched")(row), "gain at matched forgetting, arm minus control"), column("matched_p", "p", (row) => small(row.matched_p)), column("matched_holm", "p (Holm)", (row) => small(row.matched_holm)),
        column("forgetting", "at forgetting", (row) => bits(row.forgetting)), column("gained", "Arm's gain there", (row) => bits(row.gained)), column("control_gain", "Control's gain", (row) => bits(row.control_gain), "at its end"),
        column("gain", "Plain difference", (row) => row.note || told("gain")(row), "gain at the end, arm minus control"), column("gain_holm", "p (Holm) plain", (row) => small(row.gain_holm)),
      ], target.contrasts, { size: 60, file: `contrasts-${i}` });
    }
  });

  if (document.getElementById("mask-table")) {
    const targets = [...new Set(data.masks.map((row) => row.target))];
    fill("mask-target", targets.map((target) => [target, target]));
    const drawn = () => data.mask_series.filter((row) => row.target === chosen("mask-target"));
    addFigure("masks", () => ({ ...data.specs.masks, height: 58 * new Set(drawn().map((row) => row.label)).size + 12 }), drawn, () => data.mask_series);
    onChange("mask-target", () => redraw("masks"));
    dataTable("mask-table", [
      name("target", "Target"), name("rule", "Cells of"), column("cells", "Cells", (row) => count(row.cells)), column("inside", "Inside", told("inside")), column("outside", "Outside", told("outside")),
      column("control_inside", "Random, inside", told("control_inside")), column("control_outside", "Random, outside", told("control_outside")), column("control_cells", "Random cells", (row) => count(row.control_cells)),
      column("selectivity", "Selectivity", told("selectivity"), "inside minus outside"), column("control_selectivity", "of random", told("control_selectivity")), column("difference", "Difference", told("difference")), column("difference_p", "p", (row) => small(row.difference_p)),
    ], data.masks, { size: 60, file: "masks" });
  }
});
