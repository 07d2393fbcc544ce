// Command image-fsck checks and repairs disk images: qcow2, ploop and raw,
// with their parents and descriptors.
package main

import (
	"context"
	"io"
	"os"

	"github.com/alecthomas/kong"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/helper"
	"github.com/imagestack/imagestack/internal/keeper"
)

// flags of the command line; see design section 6 and fsck(8).
type flags struct {
	cli.Common
	cli.ProgressFlag
	scavengeFlags
	No            bool     `short:"n" help:"Change nothing; every file is opened for reading only."`
	Preen         bool     `short:"p" help:"Make only the repairs that lose nothing."`
	Auto          bool     `short:"a" help:"The same as -p, as fsck(8) says it."`
	Yes           bool     `short:"y" help:"Make all repairs."`
	Force         bool     `short:"f" help:"With --undo-apply: restore although the image was changed since. A check is never skipped, so fsck(8)'s -f changes nothing."`
	Undo          string   `placeholder:"FILE" help:"Undo file, or directory for it (default: IMAGE.undo, IMAGE.undo.1, …)."`
	UndoApply     string   `placeholder:"FILE" help:"Take back the repair of IMAGE that wrote this undo file."`
	Guest         bool     `help:"Check the filesystems in IMAGE with their own checkers, through a layer that is thrown away; with -y repair them into a new top layer."`
	Dump          string   `placeholder:"FILE" help:"Write all metadata of IMAGE to a file, for --restore."`
	DumpJSON      bool     `name:"dump-json" help:"Print where the metadata and the data of IMAGE lie, as JSON."`
	ForceShare    bool     `short:"U" help:"With --dump, --dump-json: read an image that another program is writing to. The dump is what a power cut would leave now."`
	Restore       string   `placeholder:"FILE" help:"Put back the metadata of a damaged IMAGE from a dump that fits; shows what it would do without -y."`
	JSON          bool     `help:"Print one JSON document on stdout."`
	ProgressFD    *int     `short:"C" name:"progress-fd" placeholder:"FD" help:"Write progress to this descriptor as e2fsck does; 0 is a bar on stderr."`
	Memory        cli.Size `default:"256M" placeholder:"SIZE" help:"Bound of the memory for tables (default 256M)."`
	Format        string   `placeholder:"FMT" help:"Format of IMAGE: raw, ploop (alias parallels) or qcow2; found out if not given."`
	BackingFormat string   `placeholder:"FMT" help:"Format of a backing file whose format the image does not state."`
	AllowPath     []string `placeholder:"DIR" sep:"none" help:"Also look at parents and data files in this directory (repeatable)."`
	cli.SandboxFlags
	UID    string   `name:"uid" placeholder:"USER" help:"Let the check run as this user (root); for checks that change nothing."`
	Data   bool     `help:"Also decompress every compressed cluster."`
	Compat string   `placeholder:"TOOL" enum:",qemu" default:"" help:"qemu: exit codes and output of qemu-img check; looks at the one file only."`
	Images []string `arg:"" name:"image" placeholder:"IMAGE" help:"Top layer, DiskDescriptor.xml or bundle directory."`
}

func main() {
	helper.Be()
	if keeper.Be("fsck-keeper", newAssistant) {
		os.Exit(cli.ExitOK)
	}
	cli.Main(tool(os.Stdin, os.Stdout, os.Stderr))
}

// tool is image-fsck with these streams.
func tool(stdin *os.File, stdout, stderr io.Writer) cli.Tool {
	f := new(flags)
	return cli.Tool{
		Name:        "image-fsck",
		Description: "Check and repair disk images. Without -n, -p or -y it asks on a terminal, and elsewhere changes nothing.",
		Flags:       f,
		Codes:       exitCode,
		Run: func(ctx context.Context, _ *kong.Context) error {
			r := &run{flags: f, stdin: stdin, stdout: stdout, stderr: stderr}
			if f.scavenging() {
				return r.scavenge(ctx)
			}
			return r.do(ctx)
		},
	}
}

// exitCode maps the exit codes of the house to those of fsck(8).
func exitCode(code int) int {
	switch code {
	case cli.ExitOK:
		return fsck.ExitClean
	case cli.ExitUsage:
		return fsck.ExitUsage
	case cli.ExitDamaged:
		return fsck.ExitUncorrected
	}
	if code > 128 { // a signal
		return fsck.ExitCancelled
	}
	return fsck.ExitOperational
}
