package main

import (
	"flag"
	"os"
	"testing"

	"github.com/imagestack/imagestack/fsck"
)

//go:generate go test -run TestCodesDocument -update

var update = flag.Bool("update", false, "write docs/fsck-codes.md")

const codesHead = `# Codes of image-fsck

Every finding has one of these codes. They are an interface: none is ever renamed. A *leak*, *damage* or *fatal*
finding that is not fixed makes the exit code include 4; a *note* does not.

This page is made from the code: ` + "`go generate ./cmd/image-fsck`" + `.
`

// The page lists every code of every checker that the tool has.
func TestCodesDocument(t *testing.T) {
	const path = "../../docs/fsck-codes.md"
	want := codesHead + fsck.CodesMarkdown()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/fsck-codes.md is stale: run go generate ./cmd/image-fsck")
	}
	for _, format := range []string{"raw", "ploop", "ploop-descriptor", "qcow2"} {
		if _, err := fsck.CheckerFor(format); err != nil {
			t.Error(err)
		}
	}
}
