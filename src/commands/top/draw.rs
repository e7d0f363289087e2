//! How `top` looks, from 80 columns on.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Row, Table, TableState};

use super::super::status::errors;
use super::super::units::{byte_rate, bytes, rate, span};
use super::model::{ConnectionRow, InstanceRow, Model};
use crate::model::ProxyAddr;
use crate::overview::{PathwayState, State};

/// Eighths of a cell.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The sparklines' width where there is room for them.
const SPARKLINE: u16 = 14;

/// From this width on there is room for IPv6 addresses and one more column.
const ROOMY: u16 = 120;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    // a third for the instances, at most what they need
    let all = frame.area();
    let needed = u16::try_from(model.instances.len())
        .unwrap_or(u16::MAX)
        .saturating_add(1);
    let upper = needed.min((all.height / 2).max(2));
    let [title, instances, gap, connections, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(upper),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(all);
    frame.render_widget(headline(model), title);
    draw_instances(frame, model, instances);
    let what = match model.instances.get(model.selected) {
        Some(row) if model.only => format!("connections of {}", row.report.name),
        _ => "connections".to_owned(),
    };
    let heading = format!("{what}, by {}", model.order.name());
    frame.render_widget(Line::from(heading.bold()), gap);
    draw_connections(frame, model, connections);
    frame.render_widget(help(model), keys);
}

fn headline(model: &Model) -> Line<'_> {
    if let Some(why) = &model.lost {
        return Line::from(why.as_str().fg(Color::Red));
    }
    let sum = |of: fn(&InstanceRow) -> f64| model.instances.iter().map(of).sum::<f64>();
    let active: u64 = model
        .instances
        .iter()
        .map(|row| row.report.totals.active)
        .sum();
    let pids: Vec<String> = model.pids.iter().map(u32::to_string).collect();
    Line::from(vec![
        Span::from("mmproxyctl ").bold(),
        // in front: on 80 columns the end may be cut off
        Span::from(if model.paused { "paused " } else { "" }).fg(Color::Yellow),
        Span::from(format!(
            "pid {}  {} instances  {active} active  {}/s  in {}  out {}",
            pids.join(" "),
            model.instances.len(),
            rate(sum(|row| row.connections)),
            byte_rate(sum(|row| row.to_target)),
            byte_rate(sum(|row| row.to_client)),
        )),
    ])
}

fn help(model: &Model) -> Line<'static> {
    let only = if model.only { "all" } else { "only this" };
    Line::from(format!(
        "q quit  ↑↓ instance  Enter {only}  s order  p pause"
    ))
    .dim()
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Text::from(text).alignment(Alignment::Right))
}

fn header(names: impl IntoIterator<Item = &'static str>, first_right: usize) -> Row<'static> {
    let cells = names.into_iter().enumerate().map(|(at, name)| {
        let text = Text::from(name);
        Cell::from(if at >= first_right && !name.is_empty() {
            text.alignment(Alignment::Right)
        } else {
            text
        })
    });
    Row::new(cells).style(Style::new().add_modifier(Modifier::DIM))
}

fn draw_instances(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let widths = [
        Constraint::Min(12),
        Constraint::Length(10),
        Constraint::Length(6),
        Constraint::Length(5),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(SPARKLINE),
    ];
    let rows = model.instances.iter().map(instance);
    let table = Table::new(rows, widths)
        .header(header(
            [
                "INSTANCE", "STATE", "ACTIVE", "/s", "IN", "OUT", "ERRORS", "",
            ],
            2,
        ))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(Some(model.selected));
    frame.render_stateful_widget(table, area, &mut state);
}

fn instance(row: &InstanceRow) -> Row<'static> {
    let report = &row.report;
    // what is wrong with the pathway matters more than that the relay runs
    let (state, color) = match (report.standing.state, report.pathway.state) {
        (State::Running, PathwayState::Incomplete) => ("no pathway", Color::Red),
        (State::Running, _) => ("running", Color::Green),
        (State::Waiting, _) => ("waiting", Color::Red),
        (state, _) => (state.name(), Color::Yellow),
    };
    let failed = errors(&report.totals);
    Row::new([
        Cell::from(report.name.clone()),
        Cell::from(state).style(Style::new().fg(color)),
        right(report.totals.active.to_string()),
        right(rate(row.connections)),
        right(byte_rate(row.to_target)),
        right(byte_rate(row.to_client)),
        right(failed.to_string()),
        Cell::from(sparkline(&row.history, SPARKLINE.into())).style(Style::new().fg(Color::Cyan)),
    ])
}

/// The newest values at the right, each in proportion to the highest shown.
fn sparkline(history: &VecDeque<u64>, width: usize) -> String {
    let shown = history.iter().skip(history.len().saturating_sub(width));
    let highest = shown.clone().copied().max().unwrap_or(0);
    let bars: String = shown
        .map(|&value| match highest {
            0 => ' ',
            // whatever is there is seen
            _ if value == 0 => ' ',
            _ => {
                let eighths = u128::from(value) * 8 / u128::from(highest);
                BARS[usize::try_from(eighths).unwrap_or(0).clamp(1, 8) - 1]
            }
        })
        .collect();
    format!("{bars:>width$}")
}

fn draw_connections(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    // an IPv4 address with its port is shown whole from 80 columns on
    let roomy = area.width >= ROOMY;
    let mut widths = vec![
        Constraint::Min(21),
        Constraint::Fill(1),
        Constraint::Fill(1),
        Constraint::Length(6),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(7),
    ];
    let mut names = vec!["CLIENT", "PROXY", "INSTANCE", "AGE", "IN", "OUT", "BYTES"];
    if roomy {
        widths[0] = Constraint::Length(47);
        widths.push(Constraint::Length(6));
        names.push("IDLE");
    }
    let rows = model
        .connections()
        .take(area.height.into())
        .map(|row| connection(row, roomy));
    let table = Table::new(rows, widths).header(header(names, 3));
    frame.render_widget(table, area);
}

fn connection(row: &ConnectionRow, roomy: bool) -> Row<'static> {
    let one = &row.connection;
    let client = one
        .client
        .map_or_else(|| one.stage.name().to_owned(), |client| client.to_string());
    let mut cells = vec![
        Cell::from(client),
        Cell::from(match one.proxy {
            ProxyAddr::Inet(addr) => addr.ip().to_string(),
            local @ ProxyAddr::Local(_) => local.to_string(),
        }),
        Cell::from(one.instance.clone()),
        right(span(one.age_ms)),
        right(byte_rate(row.to_target)),
        right(byte_rate(row.to_client)),
        right(bytes(one.bytes_to_target + one.bytes_to_client)),
    ];
    if roomy {
        cells.push(right(span(one.idle_ms)));
    }
    Row::new(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_are_in_proportion() {
        let line = |values: &[u64], width| sparkline(&values.iter().copied().collect(), width);
        assert_eq!(line(&[], 3), "   ");
        assert_eq!(line(&[0, 0], 3), "   ");
        assert_eq!(line(&[1, 4, 8, 0], 5), " ▁▄█ ");
        assert_eq!(line(&[9, 9, 1], 2), "█▁");
        assert_eq!(line(&[u64::MAX, 1], 2), "█▁");
    }
}
