//! Draws a figure. For each load (row) and each metric (panel) it has a bar for each subject. The
//! bar is the median. A thin line goes from the lowest to the highest run.
//!
//! Loads differ too much for one scale, and the figure is meant to compare subjects. So the bars of
//! one load in one panel have their own scale. The values stand beside the bars, so nobody has to
//! tell colours apart.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{Figure, Panel};
use crate::subjects::Kind;

/// All sizes are in pixels.
const WIDTH: i32 = 1000;
const MARGIN: i32 = 20;
/// Space for the names of the subjects.
const NAMES: i32 = 110;
const TITLE: i32 = 46;
const PANEL_TITLE: i32 = 24;
const ROW_TITLE: i32 = 26;
const LINE: i32 = 19;
const BAR: i32 = 13;
/// Space for the value beside a bar.
const VALUE: i32 = 120;

const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x70, 0x70, 0x70);

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// The SVG. It has a white background, so that it looks the same on dark pages.
pub(super) fn draw(figure: &Figure) -> Result<String> {
    let subjects = figure.subjects();
    let row_height = ROW_TITLE + LINE * subjects.len() as i32;
    let height = TITLE + PANEL_TITLE + row_height * figure.rows.len() as i32 + MARGIN;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        write(&area, figure.title, (MARGIN, TITLE / 2), &text(16.0, INK, HPos::Left))?;
        for (index, panel) in figure.panels.iter().enumerate() {
            write(&area, panel.title, (left(figure, index), TITLE + PANEL_TITLE / 2), &bold())?;
        }
        for (row, label) in figure.rows.iter().enumerate() {
            let top = TITLE + PANEL_TITLE + row_height * row as i32;
            let line = [(MARGIN, top), (WIDTH - MARGIN, top)];
            area.draw(&PathElement::new(line, RGBColor(0xdd, 0xdd, 0xdd)))?;
            write(&area, label, (MARGIN, top + ROW_TITLE / 2), &bold())?;
            for (line, subject) in subjects.iter().enumerate() {
                let middle = top + ROW_TITLE + LINE * line as i32 + LINE / 2;
                let name = text(12.0, INK, HPos::Right);
                write(&area, subject.name(), (MARGIN + NAMES - 8, middle + 1), &name)?;
                for (index, panel) in figure.panels.iter().enumerate() {
                    let place = Place { left: left(figure, index), middle, scale: scale(figure, index, row) };
                    bar(&area, panel, row, *subject, &place)?;
                }
            }
        }
        area.present()?;
    }
    Ok(svg)
}

/// Where a bar begins, and how many pixels one unit of its value has.
struct Place {
    left: i32,
    middle: i32,
    scale: f64,
}

fn bar(area: &Area<'_>, panel: &Panel, row: usize, subject: Kind, place: &Place) -> Result<()> {
    let &Place { left, middle, scale } = place;
    let at = |value: f64| left + (value.max(0.0) * scale).round() as i32;
    let Some(cell) = panel.cell(row, subject) else {
        return write(area, "–", (left, middle + 1), &text(12.0, FAINT, HPos::Left));
    };
    let (top, bottom) = (middle - BAR / 2, middle - BAR / 2 + BAR);
    // A bar is at least one pixel long.
    let end = at(cell.median).max(left + 1);
    area.draw(&Rectangle::new([(left, top), (end, bottom)], colour(subject).filled()))?;
    area.draw(&PathElement::new([(at(cell.min), middle), (at(cell.max), middle)], INK))?;
    let ratio = panel.to_direct(row, cell).map_or_else(String::new, |ratio| format!(" ({ratio})"));
    let value = panel.unit.show(cell.median) + &ratio;
    let beside = at(cell.max).max(end) + 5;
    write(area, &value, (beside, middle + 1), &text(12.0, INK, HPos::Left))
}

fn left(figure: &Figure, panel: usize) -> i32 {
    MARGIN + NAMES + panel_width(figure) * panel as i32
}

fn panel_width(figure: &Figure) -> i32 {
    (WIDTH - 2 * MARGIN - NAMES) / figure.panels.len() as i32
}

/// Pixels for one unit. The longest bar of the row leaves room for its value.
fn scale(figure: &Figure, panel: usize, row: usize) -> f64 {
    let longest = |panel: &Panel| panel.cells[row].iter().map(|cell| cell.max).fold(0.0, f64::max);
    let longest = if figure.one_scale {
        figure.panels.iter().map(longest).fold(0.0, f64::max)
    } else {
        longest(&figure.panels[panel])
    };
    if longest > 0.0 { f64::from(panel_width(figure) - VALUE) / longest } else { 0.0 }
}

/// The palette of Okabe and Ito, which colour-blind people can tell apart. Steer's colours are blue
/// and green, those of the other proxies orange to pink.
fn colour(subject: Kind) -> RGBColor {
    match subject {
        Kind::Direct => RGBColor(0x80, 0x80, 0x80),
        Kind::SteerPacket => RGBColor(0x00, 0x72, 0xb2),
        Kind::SteerSockmap => RGBColor(0x56, 0xb4, 0xe9),
        Kind::SteerRelay => RGBColor(0x00, 0x9e, 0x73),
        Kind::Haproxy => RGBColor(0xe6, 0x9f, 0x00),
        Kind::Nginx => RGBColor(0xd5, 0x5e, 0x00),
        Kind::Envoy => RGBColor(0xcc, 0x79, 0xa7),
    }
}

fn text(size: f64, colour: RGBColor, side: HPos) -> TextStyle<'static> {
    font(size).color(&colour).pos(Pos::new(side, VPos::Center))
}

fn bold() -> TextStyle<'static> {
    font(12.0).style(FontStyle::Bold).color(&INK).pos(Pos::new(HPos::Left, VPos::Center))
}

/// `size` is the `font-size` in the SVG. The SVG backend writes a smaller one than plotters' own
/// size.
fn font(size: f64) -> FontDesc<'static> {
    ("sans-serif", size * 1.24).into_font()
}

fn write(area: &Area<'_>, what: &str, place: (i32, i32), style: &TextStyle<'_>) -> Result<()> {
    Ok(area.draw_text(what, style, place)?)
}
