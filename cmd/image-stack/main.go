// Command image-stack inspects a stack of disk images as a whole.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/sandbox"
	"github.com/imagestack/imagestack/layers/open"
)

type flags struct {
	cli.Common
	Info infoCmd `cmd:"" help:"Show every layer: path, format, sizes, flags, snapshots."`
	Map  mapCmd  `cmd:"" help:"List where every part of the disk is stored."`
}

// image are the flags of every subcommand that reads one stack.
type image struct {
	cli.ImageFlags
	cli.SandboxFlags
	cli.ProgressFlag
	Snapshot string `placeholder:"ID" help:"Look at a snapshot: id or name (qcow2), GUID (ploop bundle)."`
	JSON     bool   `help:"Print one JSON document on stdout."`
	Image    string `arg:"" placeholder:"IMAGE" help:"Top layer, DiskDescriptor.xml or bundle directory."`
}

func (i *image) options() open.Options {
	return open.Options{
		Format: i.Format, BackingFormat: i.BackingFormat, Snapshot: i.Snapshot,
		AllowPaths: i.AllowPath, CacheSize: int64(i.CacheSize),
	}
}

// confine gives up, before the image is looked at, all that reading it does not
// need.
func (i *image) confine() error {
	defer sandbox.Attack("parse") // of test builds
	if i.Sandbox == sandbox.Off {
		return nil
	}
	access, err := open.AccessTo(i.Image, i.options())
	if err != nil {
		return err
	}
	return cli.Confine(sandbox.Policy{Mode: i.Sandbox, List: access.List, Read: access.Read},
		func(what string) { fmt.Fprintln(os.Stderr, "image-stack:", what) })
}

func main() {
	var f flags
	cli.Main(cli.Tool{
		Name:        "image-stack",
		Description: "Inspect a stack of disk images (ploop bundles, qcow2 chains, raw).",
		Flags:       &f,
		Run: func(ctx context.Context, parsed *kong.Context) error {
			parsed.BindTo(ctx, (*context.Context)(nil))
			return parsed.Run()
		},
	})
}
