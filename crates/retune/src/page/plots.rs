//! The plots of a report, as SVG. They are as wide as a phone, so that their texts are as large there as those around them, and stand beside each
//! other where there is room.
//!
//! What is drawn in `INK` and `GRID` takes the colours of the page, by rules in `page.html` that name these two.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (360, 290);
const INK: RGBColor = RGBColor(0x11, 0x11, 0x11);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
/// Colours that people tell apart whatever their eyes (Okabe and Ito 2008), without the black and the yellow, which one of the two papers swallows; the
/// numbers in the marks say what is what when they are used up.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
];
const FONT: &str = "sans-serif";
const SMALL: u32 = 13;

/// The colour of the variant with this number, counted from 0.
pub fn colour(number: usize) -> RGBColor {
    COLOURS[number % COLOURS.len()]
}

/// What is legible on it: black, but on the darkest.
fn ink_on(number: usize) -> RGBColor {
    if number.is_multiple_of(COLOURS.len()) { WHITE } else { BLACK }
}

/// The same for HTML: a background, and what is legible on it.
pub fn css(number: usize) -> String {
    let (RGBColor(r, g, b), RGBColor(red, green, blue)) = (colour(number), ink_on(number));
    format!("#{r:02x}{g:02x}{b:02x};color:#{red:02x}{green:02x}{blue:02x}")
}

/// A variant in a plot.
#[derive(Clone, Copy)]
pub struct Mark {
    /// Counted from 0.
    pub number: usize,
    pub x: f64,
    pub y: f64,
    /// Whether no other has less of both.
    pub on_frontier: bool,
}

/// Which marks no other beats in both.
pub fn mark_frontier(marks: &mut [Mark]) {
    let points: Vec<(f64, f64)> = marks.iter().map(|mark| (mark.x, mark.y)).collect();
    for mark in marks {
        let beats = |&(x, y): &(f64, f64)| x <= mark.x && y <= mark.y && (x < mark.x || y < mark.y);
        mark.on_frontier = !points.iter().any(beats);
    }
}

/// How numbers of an axis are written.
pub type Format = fn(f64) -> String;

/// An axis.
pub struct Axis {
    pub title: String,
    pub format: Format,
    pub logarithmic: bool,
}

/// A line across the plot.
pub struct Level {
    pub y: f64,
    pub name: String,
}

/// What a plot shows.
pub enum Shape {
    Mark(Mark),
    /// A line that is alone, and has no number.
    Course(Vec<(f64, f64)>),
    /// A number that stands at the end of a line of points.
    Line {
        number: usize,
        points: Vec<(f64, f64)>,
        dots: Vec<(f64, f64)>,
    },
}

/// A plot of shapes over an axis, with levels that have no place on it.
pub fn plot(x: &Axis, y: &Axis, shapes: &[Shape], levels: &[Level], with_frontier: bool) -> Result<String> {
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    for shape in shapes {
        match shape {
            Shape::Mark(mark) => {
                xs.push(mark.x);
                ys.push(mark.y);
            }
            Shape::Course(points) => {
                xs.extend(points.iter().map(|point| point.0));
                ys.extend(points.iter().map(|point| point.1));
            }
            Shape::Line { points, dots, .. } => {
                xs.extend(points.iter().chain(dots).map(|point| point.0));
                ys.extend(points.iter().chain(dots).map(|point| point.1));
            }
        }
    }
    // A level far off would press all that is to be told apart into a line: it stands at the edge.
    let of_shapes = range(&ys, 0.1);
    let near = of_shapes.start - of_shapes.end..2.0 * of_shapes.end - of_shapes.start;
    ys.extend(levels.iter().map(|level| level.y).filter(|y| near.contains(y)));
    let ys = range(&ys, 0.1);
    match x.logarithmic {
        true => {
            let logs: Vec<f64> = xs.iter().filter(|x| **x > 0.0).map(|x| x.log10()).collect();
            let logs = range(&logs, 0.12);
            let xs = (10f64.powf(logs.start)..10f64.powf(logs.end)).log_scale();
            draw(xs, ys, x, y, shapes, levels, with_frontier)
        }
        false => {
            let most = xs.iter().copied().fold(0.0, f64::max);
            draw(0.0..if most > 0.0 { most * 1.08 } else { 1.0 }, ys, x, y, shapes, levels, with_frontier)
        }
    }
}

/// What values span, with a margin; of none or of one something around it.
fn range(values: &[f64], margin: f64) -> Range<f64> {
    let finite = || values.iter().copied().filter(|value| value.is_finite());
    let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    if low > high {
        return 0.0..1.0;
    }
    let room = if high > low { margin * (high - low) } else { (0.05 * high.abs()).max(0.1) };
    low - room..high + room
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot cannot be drawn: {error}")
}

fn small() -> TextStyle<'static> {
    TextStyle::from((FONT, SMALL)).color(&INK)
}

fn draw<X>(
    xs: X,
    ys: Range<f64>,
    x: &Axis,
    y: &Axis,
    shapes: &[Shape],
    levels: &[Level],
    with_frontier: bool,
) -> Result<String>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut builder = ChartBuilder::on(&root);
        builder.margin(6).margin_right(14).x_label_area_size(40).y_label_area_size(52);
        let mut chart = builder.build_cartesian_2d(xs, ys.clone()).map_err(failed)?;
        let xs_any = chart.x_range().start;
        let (x_format, y_format) = (x.format, y.format);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .x_labels(4)
            .y_labels(5)
            .x_label_formatter(&|value| x_format(*value))
            .y_label_formatter(&|value| y_format(*value))
            .x_label_style(small())
            .y_label_style(small())
            .axis_desc_style(small())
            .x_desc(x.title.clone())
            .y_desc(y.title.clone())
            .draw()
            .map_err(failed)?;
        let (width, height) = chart.plotting_area().dim_in_pixel();
        let (left, top) = chart.plotting_area().get_base_pixel();
        let (right, bottom) = (left + width as i32, top + height as i32);
        for (number, level) in levels.iter().enumerate() {
            let is_inside = ys.contains(&level.y);
            let at = if is_inside { chart.backend_coord(&(xs_any, level.y)).1 } else { top + 14 * (number as i32 + 1) };
            let dash = |from: i32| PathElement::new(vec![(from, at), (from + 5, at)], INK);
            for from in (left..right).step_by(9).filter(|_| is_inside) {
                root.draw(&dash(from)).map_err(failed)?;
            }
            // Neighbours' names stand at either end.
            let (side, place) = if number % 2 == 0 { (HPos::Right, right - 2) } else { (HPos::Left, left + 4) };
            let direction = if level.y > ys.end { "above" } else { "below" };
            let text = if is_inside {
                level.name.clone()
            } else {
                format!("{}: {}, {direction}", level.name, y_format(level.y))
            };
            root.draw(&Text::new(text, (place, at - 3), small().pos(Pos::new(side, VPos::Bottom)))).map_err(failed)?;
        }
        if with_frontier {
            let mut frontier: Vec<(f64, f64)> = shapes
                .iter()
                .filter_map(|shape| match shape {
                    Shape::Mark(mark) if mark.on_frontier => Some((mark.x, mark.y)),
                    _ => None,
                })
                .collect();
            frontier.sort_by(|a, b| a.0.total_cmp(&b.0));
            chart.draw_series(LineSeries::new(frontier, INK.stroke_width(1))).map_err(failed)?;
        }
        for shape in shapes {
            let (number, points, dots) = match shape {
                Shape::Mark(_) => continue,
                Shape::Course(points) => (0, points, &[][..]),
                Shape::Line { number, points, dots } => (*number, points, &dots[..]),
            };
            let colour = colour(number);
            chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2))).map_err(failed)?;
            let dot = |at: &(f64, f64)| Circle::new(*at, 3, colour.filled());
            chart.draw_series(dots.iter().map(dot)).map_err(failed)?;
        }
        // Numbers last, so that no line runs over them. Those that would cover each other move: of marks to the left, of lines up or down.
        let mut taken: Vec<(i32, i32)> = Vec::new();
        for shape in shapes {
            let (number, end, ringed) = match shape {
                Shape::Course(_) => continue,
                Shape::Mark(mark) => (mark.number, Some((mark.x, mark.y)), mark.on_frontier && with_frontier),
                Shape::Line { number, points, dots } => (*number, points.last().or(dots.last()).copied(), false),
            };
            let Some(end) = end.map(|end| chart.backend_coord(&end)) else { continue };
            let is_free = |at: &(i32, i32)| !taken.iter().any(|&(x, y)| (x - at.0).abs() < 16 && (y - at.1).abs() < 15);
            let is_inside = |at: &(i32, i32)| (left..=right).contains(&at.0) && (top..=bottom).contains(&at.1);
            let places = (0..20).flat_map(|n| match shape {
                Shape::Mark(_) => [(end.0 - 18 * n, end.1); 2],
                _ => [(end.0, end.1 - 16 * n), (end.0, end.1 + 16 * n)],
            });
            let at = places.into_iter().find(|at| is_free(at) && is_inside(at)).unwrap_or(end);
            taken.push(at);
            number_at(&root, at, number, ringed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// A variant's number in a disc of its colour, with a ring where it is marked.
fn number_at<B: DrawingBackend>(
    root: &DrawingArea<B, plotters::coord::Shift>,
    at: (i32, i32),
    number: usize,
    ringed: bool,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    if ringed {
        root.draw(&Circle::new(at, 11, INK.stroke_width(2))).map_err(failed)?;
    }
    root.draw(&Circle::new(at, 8, colour(number).filled())).map_err(failed)?;
    let ink = ink_on(number);
    let style = TextStyle::from((FONT, 13)).color(&ink).pos(Pos::new(HPos::Center, VPos::Center));
    root.draw(&Text::new((number + 1).to_string(), at, style)).map_err(failed)
}

/// One line of a plot of differences.
pub struct Row {
    pub number: usize,
    pub name: String,
    pub estimate: f64,
    pub low: f64,
    pub high: f64,
}

/// Differences with their intervals, a line each, and where there is none.
pub fn intervals(rows: &[Row], title: &str) -> Result<String> {
    let mut svg = String::new();
    let ends = rows.iter().flat_map(|row| [row.low, row.high]).chain([0.0]).collect::<Vec<_>>();
    let xs = range(&ends, 0.08);
    let height = 62 + 34 * rows.len() as u32;
    {
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
        let mut builder = ChartBuilder::on(&root);
        builder.margin(8).margin_right(16).x_label_area_size(40);
        let mut chart = builder.build_cartesian_2d(xs, 0.0..rows.len() as f64).map_err(failed)?;
        mesh_of_rows(&mut chart, 5, &|value| short(*value), title)?;
        let zero = vec![(0.0, 0.0), (0.0, rows.len() as f64)];
        chart.draw_series(LineSeries::new(zero, INK.stroke_width(1))).map_err(failed)?;
        let (left, _) = chart.plotting_area().get_base_pixel();
        for (place, row) in rows.iter().enumerate() {
            let middle = (rows.len() - place) as f64 - 0.65;
            let bar = vec![(row.low, middle), (row.high, middle)];
            chart.draw_series(LineSeries::new(bar, colour(row.number).stroke_width(4))).map_err(failed)?;
            let at = chart.backend_coord(&(row.estimate, middle));
            number_at(&root, at, row.number, false)?;
            let style = small().pos(Pos::new(HPos::Left, VPos::Bottom));
            root.draw(&Text::new(row.name.clone(), (left, at.1 - 9), style)).map_err(failed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// The lines and numbers of a plot whose rows stand below each other, each under its name.
fn mesh_of_rows(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<RangedCoordf64, RangedCoordf64>>,
    labels: usize,
    format: &dyn Fn(&f64) -> String,
    title: &str,
) -> Result<()> {
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_labels(labels)
        .x_label_formatter(&format)
        .x_label_style(small())
        .axis_desc_style(small())
        .x_desc(title.to_owned())
        .draw()
        .map_err(failed)
}

/// A bar of parts that stand one after another.
pub struct Bar {
    pub name: String,
    pub parts: Vec<f64>,
    /// Where a line crosses it.
    pub mark: Option<f64>,
}

/// Bars below each other, each under its name; a part has the same colour in all.
pub fn bars(bars: &[Bar], title: &str, format: Format) -> Result<String> {
    let mut svg = String::new();
    let ends = bars.iter().flat_map(|bar| [bar.parts.iter().sum(), bar.mark.unwrap_or(0.0)]);
    let most: f64 = ends.fold(0.0, f64::max);
    let xs = 0.0..if most > 0.0 { 1.05 * most } else { 1.0 };
    let height = 62 + 36 * bars.len() as u32;
    {
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
        let mut builder = ChartBuilder::on(&root);
        builder.margin(8).margin_right(16).x_label_area_size(40);
        let mut chart = builder.build_cartesian_2d(xs, 0.0..bars.len().max(1) as f64).map_err(failed)?;
        mesh_of_rows(&mut chart, 4, &|value| format(*value), title)?;
        for (place, bar) in bars.iter().enumerate() {
            let (bottom, top) = ((bars.len() - place) as f64 - 0.92, (bars.len() - place) as f64 - 0.52);
            let mut from = 0.0;
            for (number, part) in bar.parts.iter().enumerate() {
                let corners = [(from, bottom), (from + part, top)];
                chart.draw_series([Rectangle::new(corners, colour(number).filled())]).map_err(failed)?;
                from += part;
            }
            if let Some(mark) = bar.mark {
                let line = vec![(mark, bottom - 0.06), (mark, top + 0.06)];
                chart.draw_series(LineSeries::new(line, INK.stroke_width(2))).map_err(failed)?;
            }
            let (left, at) = chart.backend_coord(&(0.0, top));
            let style = small().pos(Pos::new(HPos::Left, VPos::Bottom));
            root.draw(&Text::new(bar.name.clone(), (left, at - 2), style)).map_err(failed)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// A number of an axis whose numbers may be far below 1.
pub fn scientific(value: f64) -> String {
    if value.abs() >= 0.01 || value.abs() < 1e-12 { short(value) } else { format!("{value:.1e}").replace(".0e", "e") }
}

/// A number of an axis, with as many digits as tell its neighbours apart.
pub fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        s if s == 0.0 || s < 1e-9 => "0".to_owned(),
        s if s >= 1e9 => format!("{}G", trimmed(value / 1e9)),
        s if s >= 1e6 => format!("{}M", trimmed(value / 1e6)),
        s if s >= 1e4 => format!("{}k", trimmed(value / 1e3)),
        _ => trimmed(value),
    }
}

fn trimmed(value: f64) -> String {
    let digits = if value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        3
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frontier_is_what_nothing_beats_in_both() {
        let mark = |number: usize, x, y| Mark { number, x, y, on_frontier: false };
        let mut marks = [mark(0, 1.0, 3.0), mark(1, 2.0, 2.0), mark(2, 2.0, 2.5), mark(3, 3.0, 2.0), mark(4, 4.0, 1.0)];
        mark_frontier(&mut marks);
        let on: Vec<usize> = marks.iter().filter(|mark| mark.on_frontier).map(|mark| mark.number).collect();
        assert_eq!(on, [0, 1, 4]);
    }

    #[test]
    fn numbers_of_axes_are_short() {
        let texts = [0.0, 0.125, -0.5, 2.0, 12.5, 150.0, 9_000.0, 25_000.0, 134_000_000.0].map(short);
        assert_eq!(texts, ["0", "0.125", "-0.5", "2", "12.5", "150", "9000", "25k", "134M"]);
        assert_eq!([0.0, 2e-4, 1.5e-5, 0.5].map(scientific), ["0", "2e-4", "1.5e-5", "0.5"]);
    }

    #[test]
    fn the_parts_of_a_bar_are_as_long_as_what_they_stand_for() {
        let bar = Bar { name: "one <&>".to_owned(), parts: vec![30.0, 10.0, 0.0], mark: Some(35.0) };
        let svg = bars(&[bar], "bytes", short).unwrap();
        let width = |number: usize| -> f64 {
            let RGBColor(r, g, b) = colour(number);
            let rect = svg.split("<rect ").find(|rect| rect.contains(&format!("#{r:02X}{g:02X}{b:02X}"))).unwrap();
            rect.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
        };
        assert!((width(0) / width(1) - 3.0).abs() < 0.1, "{svg}");
        assert!(svg.contains("one &lt;&amp;&gt;"));
    }

    #[test]
    fn a_plot_of_hardly_anything_is_a_plot() {
        let axis = |logarithmic| Axis { title: "x <&>".to_owned(), format: short, logarithmic };
        for logarithmic in [false, true] {
            let svg = plot(&axis(logarithmic), &axis(false), &[], &[], true).unwrap();
            assert!(svg.starts_with("<svg ") && svg.contains("x &lt;&amp;&gt;"), "{svg}");
            let one = Mark { number: 9, x: 5.0, y: f64::NAN, on_frontier: false };
            plot(&axis(logarithmic), &axis(false), &[Shape::Mark(one)], &[], true).unwrap();
        }
        intervals(&[], "nothing").unwrap();
        bars(&[], "nothing", short).unwrap();
    }
}
