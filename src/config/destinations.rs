//! `target=header` and `destinations=` of instances.tsv: which destinations of PROXY headers are relayed to.

use ipnet::IpNet;

use super::diagnostics::{Diagnostic, Diagnostics};
use super::options::Options;
use super::source::{Source, Word};
use super::targets::parse_service;

/// Reads both options; the prefixes where the target is in the header, `None` where it is in the columns.
pub(super) fn parse(
    source: &Source,
    given: &Options<'_>,
    found: &mut Diagnostics,
) -> Option<Vec<IpNet>> {
    const TARGET: &str = "target=header, or no target= and the service in columns 4 to 6";
    const LIST: &str =
        "the services' own addresses or networks with + between them, such as 10.0.0.5+fd00:1::/64";
    let target = given.word("target");
    let list = given.text("destinations");
    if let Some(word) = target.filter(|_| {
        given
            .text("target")
            .is_none_or(|text| text.text != "header")
    }) {
        found.push(Diagnostic::error(
            source.position(word),
            "target= is something else than 'header'",
            TARGET,
        ));
    }
    match (target, list, given.word("destinations")) {
        (None, Some(_), Some(word)) => {
            found.push(Diagnostic::error(
                source.position(word),
                "destinations= means nothing without target=header",
                "target=header beside it",
            ));
            None
        }
        (Some(word), None, _) => {
            // whoever may send a header could otherwise have anything connected to that this host reaches
            found.push(Diagnostic::error(
                source.position(word),
                "target=header without destinations=",
                format!("destinations=: {LIST}"),
            ));
            None
        }
        (Some(_), Some(list), Some(whole)) => {
            let mut prefixes = Vec::new();
            for word in list.split(|c| c == '+') {
                // nothing between two signs has no characters to point at
                let at: Word<'_> = if word.text.is_empty() { whole } else { word };
                if word.text.is_empty() {
                    found.push(Diagnostic::error(
                        source.position(at),
                        "destinations= has an empty entry",
                        LIST,
                    ));
                    continue;
                }
                match parse_service(word.text) {
                    Ok(prefix) => prefixes.push(prefix),
                    Err(mut mistake) => {
                        LIST.clone_into(&mut mistake.expected);
                        found.push(Diagnostic::value(source.position(at), mistake));
                    }
                }
            }
            Some(prefixes)
        }
        _ => None,
    }
}
