"use strict";
start((data) => {
  const known = (value) => value !== null && value !== undefined;
  const shown = (value, whole) => (Math.abs(value) >= 1000 || whole ? Math.round(value).toLocaleString("en") : value.toFixed(3));
  const interval = (row, key) => (known(row[`${key}_low`]) ? element("div", { class: "small" }, `[${row[`${key}_low`].toFixed(3)}, ${row[`${key}_high`].toFixed(3)}]`) : "");
  for (const { name, rows, columns, charts } of data.tables) {
    const label = columns[0].key;
    for (const { column, zero } of charts) {
      const drawn = rows.filter((row) => known(row[column])).map((row) => ({ label: row[label], value: row[column], low: row[`${column}_low`] ?? null, high: row[`${column}_high`] ?? null }));
      addFigure(`${name}-${column}`, () => ({ ...data.specs[zero ? "from zero" : "far from zero"], height: 34 * drawn.length + 10 }), () => drawn);
    }
    dataTable(`${name}-table`, columns.map(({ key, label, number, whole }) => ({
      key, label, number,
      show: (row) => (!known(row[key]) ? "–" : number ? element("div", {}, shown(row[key], whole), interval(row, key)) : element("bdi", {}, row[key])),
    })), rows, { size: 60, file: name });
  }
});
