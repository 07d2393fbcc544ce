// Command image-compact makes a disk image smaller, in place: it gives back what
// the guest does not use, zeros and leaks, and pulls the end of the file into
// the holes.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/imagestack/imagestack/internal/cli"
)

// flags of the command line; see docs/image-compact.md.
type flags struct {
	cli.Common
	cli.ImageFlags
	cli.SandboxFlags
	cli.ProgressFlag
	No          bool     `short:"n" help:"Only estimate; every file is opened for reading only."`
	Guest       string   `enum:"auto,off" default:"auto" help:"Give back what the filesystems in IMAGE do not use: auto (of those that can be judged) or off."`
	Gaps        bool     `help:"Also give back what no partition covers."`
	Swap        bool     `help:"Also give back the content of swap areas."`
	DedupParent bool     `help:"Also give back clusters that are equal to what the layers below show."`
	MostLeaked  bool     `help:"Also work on an image of which more is leaked than in use, as it looks when a part of the map was lost."`
	Layer       int      `placeholder:"N" help:"Work on this layer and not on the top one, 0."`
	Children    []string `placeholder:"DIR" sep:"none" type:"existingdir" help:"Also look in this directory for images that stand on the one to be worked on, which is then refused (repeatable). Its own directory is always looked at, and no other."`
	To          string   `placeholder:"NEW" help:"Leave IMAGE alone and make a compact copy of it, NEW, which must not exist."`
	MaxExtra    cli.Size `default:"64M" placeholder:"SIZE" help:"Extra space at the peak (default 64M)."`
	RateLimit   rate     `placeholder:"SIZE/s" help:"Read and move no more than this per second."`
	Resume      bool     `help:"Go on with a run that was interrupted."`
	Abandon     bool     `help:"Give up a run that was interrupted: free what it left."`
	JSON        bool     `help:"Print one JSON document on stdout."`
	Image       string   `arg:"" placeholder:"IMAGE" help:"Top layer, DiskDescriptor.xml or bundle directory."`
}

// rate is a number of bytes per second: 50M or 50M/s.
type rate int64

// UnmarshalText makes rate a flag.
func (r *rate) UnmarshalText(text []byte) error {
	n, err := cli.ParseSize(strings.TrimSuffix(string(text), "/s"))
	if err == nil && n == 0 {
		err = fmt.Errorf("rate %q: must not be zero", text)
	}
	if err == nil {
		*r = rate(n)
	}
	return err
}

func main() {
	cli.Main(tool(os.Stdout, os.Stderr))
}

// tool is image-compact with these streams.
func tool(stdout, stderr io.Writer) cli.Tool {
	f := new(flags)
	return cli.Tool{
		Name:        toolName,
		Description: "Make a disk image smaller, in place. Every moment of the work leaves an image with the same content.",
		Flags:       f,
		Run: func(ctx context.Context, _ *kong.Context) error {
			return (&run{flags: f, stdout: stdout, stderr: stderr}).do(ctx)
		},
	}
}

const toolName = "image-compact"
