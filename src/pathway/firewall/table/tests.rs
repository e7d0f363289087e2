//! Entries → layout → entries, and the shapes of nft's listing.

use super::*;
use crate::model::{ListenNetwork, Protocol};

fn entry(chain: Chain, job: Job, mark: u32, mask: u32) -> Entry {
    Entry {
        chain,
        job,
        mask: Mask::new(mask).unwrap(),
        mark: Mark::new(mark).unwrap(),
    }
}

fn entries() -> BTreeSet<Entry> {
    let marks = [
        (123, 0xff),
        (124, 0xff),
        (0x200, u32::MAX),
        (0x3000, 0xf000),
    ];
    let jobs = [
        (Chain::Output, Job::Save),
        (Chain::Output, Job::Restore),
        (Chain::Prerouting, Job::Restore),
    ];
    let of = |(mark, mask)| jobs.map(move |(chain, job)| entry(chain, job, mark, mask));
    marks.into_iter().flat_map(of).collect()
}

#[test]
fn a_layout_does_what_its_entries_say() {
    let all = entries();
    assert_eq!(Layout::of(&all).entries(), all);
    // any one of them may be missing
    for gone in &all {
        let mut rest = all.clone();
        rest.remove(gone);
        assert_eq!(Layout::of(&rest).entries(), rest);
    }
    assert!(Layout::of(&all).is_ours());
    assert!(!Layout::default().is_ours());
}

fn intercepting(mark: u32, mask: u32, text: &str, protocol: Protocol) -> Entry {
    let listen: ListenNetwork = text.parse().unwrap();
    let job = Job::Intercept(Interception { protocol, listen });
    entry(Chain::Prerouting, job, mark, mask)
}

#[test]
fn interceptions_are_entries_of_their_own() {
    let all: BTreeSet<Entry> = [
        intercepting(123, 0x20ff, "203.0.113.0/24:443", Protocol::Tcp),
        intercepting(123, 0x20ff, "203.0.113.7/32:1-65535", Protocol::Udp),
        intercepting(300, u32::MAX, "[2001:db8:5::]/64:443-444", Protocol::Udp),
    ]
    .into();
    let layout = Layout::of(&all);
    assert_eq!(layout.entries(), all);
    assert!(layout.is_ours());
    // also when a flush has left nothing but the chains
    let mut flushed = layout.clone();
    for chain in flushed.chains.values_mut() {
        chain.rules.clear();
    }
    assert!(flushed.is_ours());
    assert_eq!(flushed.entries(), BTreeSet::new());
    // what would be forwarded without a listener must not be
    let mut forwards = layout;
    let chain = forwards.chains.get_mut("intercept-0x7b-0x20ff").unwrap();
    chain
        .rules
        .retain(|rule| !matches!(rule.does, Does::Refuse(_)));
    assert_eq!(forwards.entries().len(), 1);
}

#[test]
fn one_rule_for_each_mask_and_job() {
    let Layout { chains, .. } = Layout::of(&entries());
    assert_eq!(chains["output"].rules.len(), 6);
    assert_eq!(chains["prerouting"].rules.len(), 3);
    let more: BTreeSet<Entry> = (1..=200)
        .map(|mark| entry(Chain::Output, Job::Save, mark, 0xff))
        .collect();
    assert_eq!(Layout::of(&more).chains["output"].rules.len(), 1);
}

#[test]
fn a_chain_that_does_something_else_is_no_entry() {
    let all = entries();
    let breakages: [fn(&mut Layout); 7] = [
        |layout| {
            layout
                .chains
                .get_mut("save-0x7b-0xff")
                .unwrap()
                .rules
                .clear()
        },
        |layout| _ = layout.chains.remove("save-0x7b-0xff"),
        |layout| {
            let rules = &mut layout.chains.get_mut("save-0x7b-0xff").unwrap().rules;
            let (key, keep) = (Key::Connection, 0);
            rules[0].does = Does::Set {
                key,
                keep,
                value: 123,
            };
        },
        |layout| {
            let chain = layout.chains.get_mut("output").unwrap();
            chain.hook.as_mut().unwrap().kind = "filter".to_owned();
        },
        |layout| {
            let chain = layout.chains.get_mut("output").unwrap();
            chain.hook.as_mut().unwrap().priority = 0;
        },
        |layout| layout.chains.get_mut("output").unwrap().rules.reverse(),
        |layout| layout.chains.get_mut("output").unwrap().rules.clear(),
    ];
    for (number, breakage) in breakages.into_iter().enumerate() {
        let mut layout = Layout::of(&all);
        breakage(&mut layout);
        assert!(layout.entries().len() < all.len(), "{number}");
        assert!(layout.is_ours(), "{number}");
    }
}

#[test]
fn nothing_wanted_is_no_table() {
    let text = transaction(&BTreeSet::new(), Some(&Layout::of(&entries())));
    assert_eq!(text, "add table inet mmproxy\ndelete table inet mmproxy\n");
}

#[test]
fn chains_and_elements_that_are_needed_stay_and_the_others_go() {
    let text = transaction(&entries(), Some(&Layout::of(&entries())));
    assert!(!text.contains("delete"), "{text}");
    assert!(!text.contains("elements"), "{text}");
    let mut fewer = entries();
    fewer.retain(|entry| entry.mark.get() != 123);
    let text = transaction(&fewer, Some(&Layout::of(&entries())));
    let gone: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("delete"))
        .collect();
    assert_eq!(
        gone,
        [
            "delete element inet mmproxy output-restore-0xff { 0x7b }",
            "delete element inet mmproxy output-save-0xff { 0x7b }",
            "delete element inet mmproxy prerouting-restore-0xff { 0x7b }",
            "delete chain inet mmproxy restore-0x7b-0xff",
            "delete chain inet mmproxy save-0x7b-0xff"
        ]
    );
    let back = transaction(&entries(), Some(&Layout::of(&fewer)));
    assert!(!back.contains("delete"), "{back}");
    let new = "elements = { 0x7b : jump save-0x7b-0xff }";
    assert_eq!(back.matches(new).count(), 1, "{back}");
    assert_eq!(back.matches("elements").count(), 3, "{back}");
    // the last mark of a mask takes its map along, before the chain that it leads to
    fewer.retain(|entry| entry.mask == Mask::new(0xff).unwrap());
    let text = transaction(&fewer, Some(&Layout::of(&entries())));
    let map = text.find("delete map inet mmproxy output-save-0xf000\n");
    let chain = text.find("delete chain inet mmproxy save-0x3000-0xf000\n");
    assert!(map.is_some() && map < chain, "{text}");
    assert!(transaction(&fewer, None).contains("delete table inet mmproxy"));
}

#[test]
fn an_element_that_leads_elsewhere_is_put_right() {
    let wanted = entries();
    let mut found = Layout::of(&wanted);
    let map = found.maps.get_mut("output-save-0xff").unwrap();
    map.insert(0x7b, "save-0x7c-0xff".to_owned());
    map.insert(0x99, "save-0x7c-0xff".to_owned());
    assert_eq!(found.entries().len(), wanted.len() - 1);
    let text = transaction(&wanted, Some(&found));
    let delete = text.find("delete element inet mmproxy output-save-0xff { 0x7b, 0x99 }\n");
    let add = text.find("elements = { 0x7b : jump save-0x7b-0xff }\n");
    assert!(delete.is_some() && delete < add, "{text}");
}

fn listed(objects: &str) -> Option<Table> {
    Table::parse(&format!(
        r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6"}}}},
            {{"table": {{"family": "inet", "name": "mmproxy", "handle": 1}}}}{objects}]}}"#
    ))
}

const BASE: &str = r#",
    {"map": {"table": "mmproxy", "name": "output-save-0xff", "type": "mark", "handle": 3, "map": "verdict", "elem": [[123, {"jump": {"target": "save-0x7b-0xff"}}]]}},
    {"chain": {"table": "mmproxy", "name": "save-0x7b-0xff", "handle": 1}},
    {"chain": {"table": "mmproxy", "name": "output", "handle": 5, "type": "route", "hook": "output", "prio": -150, "policy": "accept"}},
    {"rule": {"chain": "output", "handle": 12, "comment": "mmproxyctl", "expr": [{"vmap": {"key": {"&": [{"meta": {"key": "mark"}}, 255]}, "data": "@output-save-0xff"}}]}}"#;

fn with_set(value: &str) -> Option<Table> {
    listed(&format!(
        r#"{BASE}, {{"rule": {{"chain": "save-0x7b-0xff", "comment": "mmproxyctl:123", "expr":
            [{{"mangle": {{"key": {{"ct": {{"key": "mark"}}}}, "value": {value}}}}}]}}}}"#
    ))
}

#[test]
fn every_way_to_write_the_same_is_the_same() {
    let mark = r#"{"ct": {"key": "mark"}}"#;
    for value in [
        // as typed, as nft 1.0.6 lists it, with ^, and with all operands in one
        format!(r#"{{"|": [{{"&": [{mark}, 4294967040]}}, 123]}}"#),
        format!(r#"{{"|": [{{"&": [{mark}, 4294967163]}}, 123]}}"#),
        format!(r#"{{"^": [{{"&": [{mark}, 4294967040]}}, 123]}}"#),
        format!(r#"{{"|": [{{"&": [{mark}, 4294967040]}}, 120, 3]}}"#),
    ] {
        let Some(Table::Ours { entries, exact, .. }) = with_set(&value) else {
            panic!("{value}");
        };
        assert!(exact, "{value}");
        assert_eq!(entries.len(), 1, "{value}");
    }
    for value in [
        "123".to_owned(),
        mark.to_owned(),
        format!(r#"{{"|": [{{"&": [{mark}, 4294967040]}}, 124]}}"#),
        format!(r#"{{"|": [{{"&": [{mark}, 65280]}}, 123]}}"#),
        r#"{"|": [{"&": [{"meta": {"key": "mark"}}, 4294967040]}, 123]}"#.to_owned(),
        r#"{"numgen": {"mode": "inc", "mod": 2}}"#.to_owned(),
    ] {
        let Some(Table::Ours { entries, exact, .. }) = with_set(&value) else {
            panic!("{value}");
        };
        assert!(!exact && entries.is_empty(), "{value}");
    }
}

#[test]
fn a_map_within_the_rule_is_read_and_replaced() {
    let inline = r#"{"set": [[123, {"jump": {"target": "save-0x7b-0xff"}}]]}"#;
    let (_, base) = BASE.split_once("}}]]}},").unwrap();
    let base = base.replace(r#""@output-save-0xff""#, inline);
    let set = r#"{"rule": {"chain": "save-0x7b-0xff", "comment": "mmproxyctl:123", "expr":
        [{"mangle": {"key": {"ct": {"key": "mark"}}, "value": {"|": [{"&": [{"ct": {"key": "mark"}}, 4294967040]}, 123]}}}]}}"#;
    let found = listed(&format!(", {base}, {set}"));
    let Some(Table::Ours {
        entries,
        awake: true,
        exact: false,
        stays: Some(stays),
    }) = found
    else {
        panic!("{found:?}");
    };
    assert_eq!(entries, [entry(Chain::Output, Job::Save, 123, 0xff)].into());
    let text = transaction(&entries, Some(&stays));
    assert!(!text.contains("delete"), "{text}");
    assert!(text.contains("elements = { 0x7b : jump save-0x7b-0xff }"));
}

#[test]
fn whose_it_is() {
    assert_eq!(listed(""), Some(Table::Foreign));
    assert_eq!(
        listed(
            r#", {"chain": {"name": "output", "type": "route", "hook": "output", "prio": -150, "policy": "accept"}}"#
        ),
        Some(Table::Foreign)
    );
    // flushed: the chains' names are left
    assert!(matches!(
        listed(r#", {"chain": {"name": "restore-0x7b-0xff", "handle": 1}}"#),
        Some(Table::Ours { exact: false, .. })
    ));
    assert_eq!(Table::parse("{}"), None);
    assert_eq!(Table::parse("table inet mmproxy"), None);
}

#[test]
fn a_flag_or_a_set_of_somebodys_is_seen() {
    let flagged = with_set("123").map(|_| {
        Table::parse(&format!(
            r#"{{"nftables": [{{"table": {{"name": "mmproxy", "flags": ["dormant"]}}}}{BASE}]}}"#
        ))
    });
    assert!(matches!(
        flagged,
        Some(Some(Table::Ours { awake: false, .. }))
    ));
    for object in [
        r#"{"set": {"name": "mine"}}"#,
        r#"{"map": {"name": "mine", "type": "mark", "map": "ipv4_addr"}}"#,
        r#"{"map": {"name": "mine", "type": "mark", "map": "verdict", "flags": ["timeout"]}}"#,
        r#"{"map": {"name": "mine", "type": "mark", "map": "verdict", "elem": [[1, {"drop": null}]]}}"#,
    ] {
        let found = listed(&format!("{BASE}, {object}"));
        let goes = matches!(
            found,
            Some(Table::Ours {
                exact: false,
                stays: None,
                ..
            })
        );
        assert!(goes, "{object}");
    }
    // one as ours are goes alone
    let map = r#"{"map": {"name": "mine", "type": "mark", "map": "verdict"}}"#;
    let Some(Table::Ours {
        entries,
        exact: false,
        stays: Some(stays),
        ..
    }) = listed(&format!("{BASE}, {map}"))
    else {
        panic!("{map}");
    };
    assert_eq!(entries, BTreeSet::new());
    let wanted = [entry(Chain::Output, Job::Save, 123, 0xff)].into();
    assert!(transaction(&wanted, Some(&stays)).contains("delete map inet mmproxy mine\n"));
}
