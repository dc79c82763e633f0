"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.curves);
  const cursor = plot.querySelector(".cursor"), svg = plot.querySelector("svg");
  const value = plot.parentElement.querySelector(".value"), usual = value.textContent;
  const nearest = (points, step) =>
    points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const found = data.curves.map((curve) => nearest(curve.points, share * data.end));
    const text = (point) => (point[1] === null ? "not finite" : Number(point[1].toPrecision(4)) + data.unit);
    value.textContent = data.at + " " + Math.round(found[0][0]).toLocaleString("en") + ": " +
      found.map((point, i) => data.curves[i].name + " " + text(point)).join(", ");
    cursor.style.display = "block";
    cursor.style.left = box.left - plot.getBoundingClientRect().left + (found[0][0] / data.end) * box.width + "px";
  });
  plot.addEventListener("pointerleave", () => {
    cursor.style.display = "none";
    value.textContent = usual;
  });
}
