from dsconv_surgery.cli.commands import main

main()
