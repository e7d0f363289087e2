//! Commands that change one word of a configuration file and have it take effect.

use super::command;
use crate::doctor::evidence::{Evidence, Instance, Pathway};

/// A file of the configuration directory.
fn file(evidence: &Evidence, name: &str) -> String {
    let directory = evidence.host.config_dir.trim_end_matches('/');
    format!("{directory}/{name}")
}

/// A mark as somebody may have written it.
fn spelled(mark: u32) -> String {
    format!("({mark}|0[xX]0*{})", hexadecimal(mark))
}

/// Either case of each digit.
fn hexadecimal(mark: u32) -> String {
    format!("{mark:x}")
        .chars()
        .map(|digit| match digit {
            'a'..='f' => format!("[{digit}{}]", digit.to_ascii_uppercase()),
            digit => digit.to_string(),
        })
        .collect()
}

/// Gives a pathway an option, in place of the value that it may have.
pub(super) fn set_option(evidence: &Evidence, pathway: &Pathway, key: &str, value: &str) -> String {
    let (file, mark) = (file(evidence, "pathways.conf"), pathway.mark);
    if !pathway.configured {
        return format!("printf '\\n{mark} {key}={value}\\n' >>{file}");
    }
    format!(
        "sed -i -E '/^\\s*{}(\\s|#|$)/{{s/\\s+{key}=\\S+//;s/^\\s*\\S+/& {key}={value}/}}' {file}",
        spelled(mark)
    )
}

/// Gives a pathway and its instances another mark.
pub(super) fn set_mark(evidence: &Evidence, pathway: &Pathway, mark: u32) -> Vec<String> {
    let old = pathway.mark;
    let spelled = spelled(old);
    let mut commands = vec![command(evidence, &format!("pathway del {old}"))];
    if pathway.configured {
        commands.push(format!(
            "sed -i -E 's/^(\\s*){spelled}(\\s|#|$)/\\1{mark}\\3/' {}",
            file(evidence, "pathways.conf")
        ));
    }
    commands.push(format!(
        "sed -i -E 's/^([^\\t#]*\\t){spelled}\\t/\\1{mark}\\t/' {}",
        file(evidence, "instances.tsv")
    ));
    commands.push(command(evidence, &format!("pathway add {mark}")));
    commands
}

/// Gives an instance another value in a column, counted from 0.
fn set_column(evidence: &Evidence, instance: &Instance, column: usize, value: &str) -> String {
    let name = instance.name.replace('.', "\\.");
    let skipped = column - 1;
    format!(
        "sed -i -E 's/^({name}(\\t[^\\t]*){{{skipped}}}\\t)[^\\t]*/\\1{value}/' {}",
        file(evidence, "instances.tsv")
    )
}

/// Gives an instance another target, of the family of that address; then the pathway and the process.
pub(super) fn set_target(
    evidence: &Evidence,
    instance: &Instance,
    target: std::net::SocketAddr,
) -> Vec<String> {
    let column = if target.is_ipv4() { 3 } else { 5 };
    let mut commands = vec![set_column(
        evidence,
        instance,
        column,
        &target.ip().to_string(),
    )];
    let port = target.port();
    if instance
        .targets
        .iter()
        .any(|one| one.address.port() != port)
    {
        commands.push(set_column(evidence, instance, 4, &port.to_string()));
    }
    commands.push(command(evidence, &format!("pathway add {}", instance.mark)));
    commands.extend(reload(evidence, instance));
    commands
}

/// Has a running process read the files again.
pub(super) fn reload(evidence: &Evidence, instance: &Instance) -> Option<String> {
    instance.relay.as_ref().map(|_| command(evidence, "reload"))
}
