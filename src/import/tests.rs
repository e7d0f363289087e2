//! Sources as people have them, and the files that come of them; which the configuration reads.

use super::*;

fn nothing(_: &Path) -> Option<String> {
    None
}

/// The lines of instances.tsv that are no comments.
fn lines(found: &Found) -> Vec<String> {
    let text = write(&found.entries, &found.hints).instances;
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.replace('\t', " "))
        .collect()
}

/// What comes out has to be what the configuration takes.
fn assert_loads(found: &Found) {
    let files = write(&found.entries, &found.hints);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pathways.conf"), &files.pathways).unwrap();
    std::fs::write(dir.path().join("instances.tsv"), &files.instances).unwrap();
    let loaded = crate::config::load_pathways(dir.path())
        .unwrap_or_else(|mistakes| panic!("{}\n{}", mistakes.draw(false), files.instances));
    assert_eq!(loaded.instances.len(), files.relays);
}

fn of_line(line: &str) -> Found {
    let words = shlex::split(line).unwrap();
    let (meaning, mut found) = command_line(&words, None, None).unwrap().unwrap();
    found.entries.push(Entry {
        source: "command line".to_owned(),
        line: None,
        text: line.to_owned(),
        meaning,
    });
    found
}

#[test]
fn command_lines() {
    for (line, expected) in [
        (
            "go-mmproxy -l 10.0.0.1:2222 -4 127.0.0.1:22 -6 [::1]:22 -mark 124 -allowed-subnets /etc/nets",
            vec!["tcp-2222 124 10.0.0.1:2222 127.0.0.1 22 ::1 allow=/etc/nets"],
        ),
        (
            "go-mmproxy -l 0.0.0.0:2222 -4 localhost:22 -6 [::1]:22 -listeners 4",
            vec![
                "tcp-2222 123 0.0.0.0:2222 127.0.0.1 22 ::1 listeners=4",
                "tcp-2222-v6 123 [::]:2222 127.0.0.1 22 ::1 listeners=4",
            ],
        ),
        (
            "mmproxy -m 123 -l 192.0.2.1:8080 -4 127.0.0.1:8081 -6 [::1]:8081 -p udp -c 5",
            vec!["udp-8080 123 192.0.2.1:8080 127.0.0.1 8081 ::1 protocol=udp,idle-timeout=5s"],
        ),
        (
            // one line has one port
            "go-mmproxy -l 10.0.0.1:2222 -4 127.0.0.1:22 -6 [::1]:2200",
            vec!["tcp-2222 123 10.0.0.1:2222 127.0.0.1 22 -"],
        ),
        (
            "mmproxy --allowed-networks /n -l 10.0.0.1:2222 -4 127.0.0.1:22 -6 [::1]:22",
            vec!["tcp-2222 123 10.0.0.1:2222 127.0.0.1 22 ::1 allow=/n,port=any"],
        ),
        (
            "go-mmproxy -l 10.0.0.1:1 -4 127.0.0.1:1 -6 [::1]:1 -mark 254",
            vec!["tcp-1 254 10.0.0.1:1 127.0.0.1 1 ::1"],
        ),
    ] {
        let found = of_line(line);
        assert_eq!(lines(&found), expected, "{line}");
        assert_loads(&found);
    }
    assert_eq!(command_line(&["ls".to_owned()], None, None), None);
    let bad = ["go-mmproxy".to_owned(), "-nope".to_owned()];
    assert!(command_line(&bad, None, None).unwrap().is_err());
}

#[test]
fn a_unit_with_routing_and_a_working_directory() {
    let text = "[Unit]\nDescription=go-mmproxy\n\n[Service]\nWorkingDirectory=/etc/mm\n\
        ExecStartPost=+/sbin/ip rule add from 127.0.0.1/8 iif lo table 125\n\
        ExecStartPost=-/sbin/ip -6 rule add fwmark 0x9 lookup 125\n\
        # a comment\n\
        ExecStart=-/usr/bin/go-mmproxy -4 127.0.0.1:1000 \\\n    -6 \"[::1]:1000\" \\\n    -allowed-subnets nets.txt -l 10.0.0.1:1234\n\
        ExecStopPost=/bin/true\n";
    let found = unit(
        Path::new("/etc/systemd/system/edge-ssh.service"),
        text,
        &nothing,
    );
    assert_eq!(
        lines(&found),
        ["edge-ssh 125 10.0.0.1:1234 127.0.0.1 1000 ::1 allow=/etc/mm/nets.txt"]
    );
    assert_eq!(found.hints.tables, [125, 125]);
    assert_eq!(found.hints.marks, [9]);
    let written = write(&found.entries, &found.hints).instances;
    for comment in [
        "# /etc/systemd/system/edge-ssh.service:6: ExecStartPost=+/sbin/ip rule add",
        "#   not needed any more: mmproxyctl pathway does it",
        "# /etc/systemd/system/edge-ssh.service:9: ExecStart=-/usr/bin/go-mmproxy",
        "#   it had no mark: 125 from now on",
    ] {
        assert!(written.contains(comment), "{comment}\n{written}");
    }
    assert_loads(&found);
}

#[test]
fn variables_files_and_shells() {
    // as Debian's example unit has it, with quotes in quotes, and a file that overrides it
    let text = "[Service]\nEnvironment=\"ARGS=-4 127.0.0.1:22 -6 \"[::1]:22\" -l 10.0.0.1:2222\"\n\
        EnvironmentFile=-/etc/default/%p\nExecStart=/usr/bin/go-mmproxy $ARGS -mark ${MARK}\n";
    let read = |path: &Path| {
        (path == Path::new("/etc/default/go-mmproxy")).then(|| "# mark\nMARK=77\n".to_owned())
    };
    let found = unit(Path::new("go-mmproxy.service"), text, &read);
    assert_eq!(
        lines(&found),
        ["go-mmproxy 77 10.0.0.1:2222 127.0.0.1 22 ::1"]
    );

    let text =
        "ExecStart=/bin/sh -c \"sleep 1 && exec /opt/go-mmproxy -l 10.0.0.1:1 -mark 5 && true\"\n";
    let found = unit(Path::new("x.service"), text, &nothing);
    assert_eq!(lines(&found), ["x 5 10.0.0.1:1 127.0.0.1 443 ::1"]);

    let text = "ExecStart=/bin/bash /opt/mmproxy/scripts/start-mmproxy.sh %i\n";
    let found = unit(Path::new("mmproxy@.service"), text, &nothing);
    assert!(lines(&found).is_empty());
    let written = write(&found.entries, &found.hints).instances;
    assert!(
        written.contains("mmproxyctl import scripts DIR"),
        "{written}"
    );

    let text = "ExecStart=/usr/local/bin/mmproxy -c /etc/mmproxy.json\n";
    let found = unit(Path::new("mmproxy.service"), text, &nothing);
    assert_eq!(found.json_files, [PathBuf::from("/etc/mmproxy.json")]);
}

#[test]
fn compose_files() {
    let text = "services:\n  haproxy:\n    image: haproxy:2.9\n    command: haproxy -f x\n\
        \x20 ssh:\n    image: ghcr.io/someone/go-mmproxy:latest\n    command: [\"-l\", \"0.0.0.0:2222\", \"-mark\", \"123\"]\n\
        \x20 echo:\n    entrypoint: sh -x entrypoint.sh\n    command: ./go-mmproxy -l 10.5.5.3:1234 -4 10.5.5.2:9000 -p tcp -v 2 -mark 123\n";
    let found = compose(Path::new("docker-compose.yml"), text).unwrap();
    assert_eq!(
        lines(&found),
        [
            "ssh 123 0.0.0.0:2222 127.0.0.1 443 ::1",
            "ssh-v6 123 [::]:2222 127.0.0.1 443 ::1",
            "echo 123 10.5.5.3:1234 10.5.5.2 9000 -",
        ]
    );
    assert_eq!(
        found
            .entries
            .iter()
            .map(|entry| entry.line)
            .collect::<Vec<_>>(),
        [Some(5), Some(8)]
    );
    assert_loads(&found);
    assert!(
        compose(Path::new("x.yml"), "a: [")
            .unwrap_err()
            .starts_with("x.yml:")
    );
    assert!(compose(Path::new("x.yml"), "").unwrap().entries.is_empty());
}

#[test]
fn names_and_places_are_unique_and_hostile_texts_stay_comments() {
    let mut found = of_line("go-mmproxy -l 10.0.0.1:1 -mark 5");
    let again = of_line("go-mmproxy -l 10.0.0.1:1 -mark 6");
    let other = of_line("go-mmproxy -l 10.0.0.2:1 -mark 6");
    found.entries.extend(again.entries);
    found.entries.extend(other.entries);
    found.entries.push(Entry {
        source: "evil".to_owned(),
        line: Some(1),
        text: "a\nname\t5\t0.0.0.0:1".to_owned(),
        meaning: Meaning::Note("b\r\nc".to_owned()),
    });
    assert_eq!(
        lines(&found),
        [
            "tcp-1 5 10.0.0.1:1 127.0.0.1 443 ::1",
            "tcp-1-2 6 10.0.0.2:1 127.0.0.1 443 ::1",
        ]
    );
    assert_loads(&found);
}
