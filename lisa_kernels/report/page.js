"use strict";
// Values under the pointer, or under the arrow keys: the nearest x has a line and a small table of texts.
for (const figure of document.querySelectorAll(".chart")) {
  const data = JSON.parse(figure.querySelector("script.hover").textContent);
  const area = figure.querySelector(".area");
  const cross = area.querySelector(".cross");
  const tip = area.querySelector(".tip");
  let shown = -1;

  const hide = () => {
    shown = -1;
    cross.hidden = tip.hidden = true;
  };

  const line = (name, text, style) => {
    const row = document.createElement("div");
    const label = document.createElement("span");
    if (style) {
      const key = document.createElement("i");
      key.className = style;
      label.append(key);
    }
    label.append(name);
    const value = document.createElement("span");
    value.textContent = text;
    row.append(label, value);
    return row;
  };

  const show = (index) => {
    if (index === shown) return;
    shown = index;
    const row = data.rows[index];
    tip.replaceChildren(...row.map((text, at) => line(data.names[at], text, at ? data.styles[at - 1] : "")));
    cross.hidden = tip.hidden = false;
    const at = data.x[index];
    cross.style.left = `${100 * at}%`;
    if (at > 0.5) {
      tip.style.left = "auto";
      tip.style.right = `calc(${100 * (1 - at)}% + 10px)`;
    } else {
      tip.style.right = "auto";
      tip.style.left = `calc(${100 * at}% + 10px)`;
    }
  };

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    let nearest = 0;
    data.x.forEach((x, index) => {
      if (Math.abs(x - at) < Math.abs(data.x[nearest] - at)) nearest = index;
    });
    show(nearest);
  });
  area.addEventListener("pointerleave", hide);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const last = data.x.length - 1;
    const next = { ArrowLeft: Math.max(0, shown - 1), ArrowRight: Math.min(last, shown + 1), Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}
