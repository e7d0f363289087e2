//! Output that nobody reads to its end, as in `mmproxyctl status | head -1`.

use std::process::Stdio;

use super::{Lab, v1};

#[test]
fn a_verb_whose_reader_has_gone_ends_quietly() {
    let lab = Lab::new();
    let _relay = lab.run("");
    let _open = lab.client(&v1("192.0.2.7", 40_000), "hello");
    for (words, code) in [
        ("status", 0),
        ("status --json", 0),
        ("status web", 0),
        // never ends by itself
        ("status --watch=20ms", 0),
        ("status --watch=20ms --json", 0),
        ("conns", 0),
        ("conns --json", 0),
        ("explain 192.0.2.7", 0),
        ("explain 192.0.2.8", 1),
        ("reload", 0),
        ("check", 0),
        ("check --json", 0),
        ("pathway list", 0),
        ("pathway check", 0),
        ("pathway add-all", 0),
        ("completions bash", 0),
        ("man", 0),
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = lab.host.mmproxyctl(words);
        command.stdout(writer).stderr(Stdio::piped());
        let output = command.spawn().expect("mmproxyctl").wait_with_output();
        let output = output.expect("mmproxyctl");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{words}: {said}");
        assert_eq!(said, "", "{words}");
    }
    // and where stderr goes into the same pipe
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = lab.host.mmproxyctl("status nobody");
    command
        .stdout(writer.try_clone().expect("a pipe"))
        .stderr(writer);
    assert_eq!(command.status().expect("mmproxyctl").code(), Some(1));
}
